"""`python -m pissa_convert` is `pissa-convert`."""

from pissa_convert.cli import main

raise SystemExit(main())
