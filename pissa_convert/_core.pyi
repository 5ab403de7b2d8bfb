class SplitResult:
    @property
    def singular_values(self) -> list[float]: ...
    @property
    def weight_norm(self) -> float: ...
    @property
    def rounding_error(self) -> float: ...
    @property
    def estimated_deficit(self) -> float: ...
    @property
    def passes(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def householder(self) -> bool: ...
    @property
    def int8(self) -> bool: ...
    @property
    def sweep_seconds(self) -> float: ...
    @property
    def ritz_seconds(self) -> float: ...
    @property
    def residual_seconds(self) -> float: ...

class RitzTriplets:
    @property
    def sigma(self) -> list[float]: ...
    @property
    def estimated_deficit(self) -> float: ...
    @property
    def convergence(self) -> float: ...

class Splitter:
    def __init__(self, threads: int) -> None: ...
    @property
    def kernel(self) -> str: ...
    def split(
        self,
        weight: memoryview,
        rows: int,
        cols: int,
        dtype: str,
        rank: int,
        scaling: float,
        fan_in_fan_out: bool,
        a: memoryview,
        b: memoryview,
        adapter_dtype: str,
        passes: int,
        key: int,
        near: bool = False,
        precise: bool = True,
    ) -> SplitResult: ...
    def quantise(
        self,
        values: memoryview,
        dtype: str,
        code: str,
        packed: memoryview,
        absmax: memoryview,
        nested_codes: memoryview,
        nested_absmax: memoryview,
    ) -> float: ...
    def correct(
        self,
        difference: memoryview,
        rows: int,
        cols: int,
        rank: int,
        scaling: float,
        a: memoryview,
        b: memoryview,
        adapter_dtype: str,
    ) -> bool: ...
    def norm(self, values: memoryview, dtype: str) -> float: ...
    def nuclear_norm(
        self, values: memoryview, rows: int, cols: int, dtype: str, zeros: int, outside: memoryview
    ) -> tuple[float, bool]: ...
    def dequantise(self, out: memoryview, dtype: str, code: str, packed: memoryview, absmax: memoryview) -> None: ...
    def subtract_stored(
        self,
        values: memoryview,
        values_dtype: str,
        out: memoryview,
        dtype: str,
        code: str,
        packed: memoryview,
        absmax: memoryview,
    ) -> None: ...
    def relax_towards(
        self,
        target: memoryview,
        difference: memoryview,
        relaxation: float,
        dtype: str,
        code: str,
        packed: memoryview,
        absmax: memoryview,
    ) -> None: ...

def workspace_bytes(rows: int, cols: int, dtype: str, rank: int, passes: int, threads: int) -> int: ...
def refit_workspace_bytes(rows: int, cols: int, rank: int, threads: int) -> int: ...
def nuclear_norm_workspace_bytes(rows: int, cols: int, threads: int, zeros: int) -> int: ...
def code_values(code: str) -> list[float]: ...
def dynamic_map() -> list[float]: ...
def random_signs(key: int, out: memoryview) -> None: ...
def rayleigh_ritz(
    gram: memoryview, size: int, rank: int, block: int, exact: bool, vectors: memoryview
) -> RitzTriplets: ...
def ritz_triplets(
    gram: memoryview, size: int, block: int, values: list[float], vectors: memoryview
) -> RitzTriplets: ...
def kernels() -> list[str]: ...
