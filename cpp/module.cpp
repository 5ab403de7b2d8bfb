// The Python module: checks arrays, releases the GIL, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "correction.hpp"
#include "four_bit.hpp"
#include "lapack.hpp"
#include "norms.hpp"
#include "philox.hpp"
#include "rayleigh_ritz.hpp"
#include "split.hpp"

namespace py = pybind11;

namespace {

pissa::DType parse_dtype(const std::string& code) {
  if (code == "F32") return pissa::DType::f32;
  if (code == "F16") return pissa::DType::f16;
  if (code == "BF16") return pissa::DType::bf16;
  throw std::invalid_argument("dtype must be F32, F16 or BF16, not " + code);
}

struct Bytes {
  void* data;
  std::size_t count;
};

Bytes contiguous_bytes(const py::buffer& buffer, bool writable, const char* name) {
  const py::buffer_info info = buffer.request(writable);
  py::ssize_t stride = info.itemsize;
  for (py::ssize_t axis = info.ndim; axis-- > 0; stride *= info.shape[static_cast<std::size_t>(axis)]) {
    const auto index = static_cast<std::size_t>(axis);
    if (info.strides[index] != stride && info.shape[index] > 1) {
      throw std::invalid_argument(std::string(name) + " must be C-contiguous");
    }
  }
  return {info.ptr, static_cast<std::size_t>(info.size * info.itemsize)};
}

void* bytes_of(const py::buffer& buffer, bool writable, std::size_t expected, const char* name) {
  const Bytes found = contiguous_bytes(buffer, writable, name);
  if (found.count != expected) {
    throw std::invalid_argument(std::string(name) + " must be " + std::to_string(expected) + " bytes, not " +
                                std::to_string(found.count));
  }
  return found.data;
}

void* writable_bytes(const py::buffer& buffer, std::size_t expected, const char* name) {
  return bytes_of(buffer, true, expected, name);
}

pissa::Weight describe(void* data, const std::string& dtype, std::size_t rows, std::size_t cols, std::size_t rank) {
  if (rank < 1 || rank > std::min(rows, cols)) throw std::invalid_argument("rank must be in 1 … min(rows, cols)");
  return {data, parse_dtype(dtype), rows, cols};
}

pissa::SplitRequest describe_request(const py::buffer& weight, std::size_t rows, std::size_t cols,
                                     const std::string& dtype, std::size_t rank, double scaling, bool fan_in_fan_out,
                                     const py::buffer& a, const py::buffer& b, const std::string& adapter_dtype) {
  pissa::SplitRequest request{};
  request.adapter_dtype = parse_dtype(adapter_dtype);
  request.weight =
      describe(writable_bytes(weight, rows * cols * size_of(parse_dtype(dtype)), "weight"), dtype, rows, cols, rank);
  const std::size_t in = fan_in_fan_out ? rows : cols, out = fan_in_fan_out ? cols : rows;
  request.rank = rank;
  if (!(scaling > 0)) throw std::invalid_argument("scaling must be greater than 0");
  request.scaling = scaling;
  request.fan_in_fan_out = fan_in_fan_out;
  request.a = writable_bytes(a, rank * in * size_of(request.adapter_dtype), "a");
  request.b = writable_bytes(b, out * rank * size_of(request.adapter_dtype), "b");
  return request;
}

std::size_t workspace_bytes(std::size_t rows, std::size_t cols, const std::string& dtype, std::size_t rank,
                            std::size_t passes, unsigned threads) {
  return pissa::split_workspace_bytes(describe(nullptr, dtype, rows, cols, rank), rank, passes, threads);
}

std::size_t values_in(const py::buffer& values, const std::string& dtype) {
  const py::buffer_info info = values.request();
  return static_cast<std::size_t>(info.size * info.itemsize) / size_of(parse_dtype(dtype));
}

const pissa::FourBitCode& code_named(const std::string& code) {
  if (code == "nf4") return pissa::nf4_code();
  if (code == "fp4") return pissa::fp4_code();
  throw std::invalid_argument("code must be nf4 or fp4, not " + code);
}

pissa::FourBit four_bit(std::size_t count, const std::string& code, const py::buffer& packed, const py::buffer& absmax,
                        bool writable) {
  return {&code_named(code), static_cast<std::uint8_t*>(bytes_of(packed, writable, (count + 1) / 2, "packed")),
          static_cast<float*>(bytes_of(absmax, writable, 4 * pissa::four_bit_blocks(count), "absmax"))};
}

// Threads live as long as the object: one per caller that wants to split.
class Splitter {
 public:
  explicit Splitter(unsigned threads) : kernels_(pissa::select_kernels()), pool_(threads > 0 ? threads : 1) {}

  pissa::SplitResult split(const py::buffer& weight, std::size_t rows, std::size_t cols, const std::string& dtype,
                           std::size_t rank, double scaling, bool fan_in_fan_out, const py::buffer& a,
                           const py::buffer& b, const std::string& adapter_dtype, std::size_t passes, std::uint64_t key,
                           bool near, bool precise) {
    pissa::SplitRequest request =
        describe_request(weight, rows, cols, dtype, rank, scaling, fan_in_fan_out, a, b, adapter_dtype);
    request.passes = passes;
    request.key = key;
    request.precise = precise;
    if (near && (fan_in_fan_out || request.weight.dtype != pissa::DType::f32)) {
      throw std::invalid_argument("a refit is of a float matrix, out × in");
    }
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    return near ? pissa::refit(kernels_, pool_, request) : pissa::split(kernels_, pool_, request);
  }

  bool correct(const py::buffer& difference, std::size_t rows, std::size_t cols, std::size_t rank, double scaling,
               const py::buffer& a, const py::buffer& b, const std::string& adapter_dtype) {
    const pissa::SplitRequest request =
        describe_request(difference, rows, cols, "F32", rank, scaling, false, a, b, adapter_dtype);
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    return pissa::correct(kernels_, pool_, request);
  }

  double norm(const py::buffer& values, const std::string& dtype) {
    const std::size_t count = values_in(values, dtype);
    const pissa::Weight weight{values.request().ptr, parse_dtype(dtype), 1, count};
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    return pissa::frobenius_norm(kernels_, pool_, weight);
  }

  std::pair<double, bool> nuclear_norm(const py::buffer& values, std::size_t rows, std::size_t cols,
                                       const std::string& dtype, std::size_t zeros, const py::buffer& outside) {
    if (values_in(values, dtype) != rows * cols) throw std::invalid_argument("values must be rows × cols");
    const pissa::Weight weight{values.request().ptr, parse_dtype(dtype), rows, cols};
    const py::buffer_info given = outside.request();
    const auto* columns = static_cast<const float*>(
        given.size > 0 ? bytes_of(outside, false, std::min(rows, cols) * zeros * sizeof(float), "outside") : nullptr);
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    const pissa::NuclearNorm norm = pissa::nuclear_norm(kernels_, pool_, weight, zeros, columns);
    return {norm.value, norm.estimated};
  }

  // What the file keeps of the statistics: in 8 bits where there is a place for `nested_absmax`, else as they are.
  double quantise(const py::buffer& values, const std::string& dtype, const std::string& code, const py::buffer& packed,
                  const py::buffer& absmax, const py::buffer& nested_codes, const py::buffer& nested_absmax) {
    const std::size_t count = values_in(values, dtype);
    const pissa::FourBit to = four_bit(count, code, packed, absmax, true);
    const std::size_t blocks = pissa::four_bit_blocks(count);
    const bool nests = nested_codes.request().size > 0;
    auto* codes = static_cast<std::uint8_t*>(nests ? writable_bytes(nested_codes, blocks, "nested_codes") : nullptr);
    const std::size_t nested_blocks = (blocks + pissa::kNestedBlock - 1) / pissa::kNestedBlock;
    auto* nested =
        static_cast<float*>(nests ? writable_bytes(nested_absmax, 4 * nested_blocks, "nested_absmax") : nullptr);
    const void* from = values.request().ptr;
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!pissa::quantise(kernels_, pool_, from, parse_dtype(dtype), count, to)) {
      throw std::domain_error("holds NaN or infinity");
    }
    return nests ? static_cast<double>(pissa::nest_absmax(to.absmax, blocks, codes, nested)) : 0.0;
  }

  void dequantise(const py::buffer& out, const std::string& dtype, const std::string& code, const py::buffer& packed,
                  const py::buffer& absmax) {
    const std::size_t count = values_in(out, dtype);
    const pissa::FourBit stored = four_bit(count, code, packed, absmax, false);
    void* to = writable_bytes(out, count * size_of(parse_dtype(dtype)), "out");
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    pissa::dequantise(kernels_, pool_, stored, parse_dtype(dtype), count, to);
  }

  void subtract_stored(const py::buffer& values, const std::string& values_dtype, const py::buffer& out,
                       const std::string& dtype, const std::string& code, const py::buffer& packed,
                       const py::buffer& absmax) {
    if (values_dtype != dtype && values_dtype != "F32") throw std::invalid_argument("values must be F32, or as Q is");
    const std::size_t count = values_in(values, values_dtype);
    const pissa::FourBit stored = four_bit(count, code, packed, absmax, false);
    const void* from = values.request().ptr;
    auto* to = static_cast<float*>(writable_bytes(out, count * sizeof(float), "out"));
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    pissa::subtract_stored(kernels_, pool_, stored, parse_dtype(dtype), count, from, parse_dtype(values_dtype), to);
  }

  void relax_towards(const py::buffer& target, const py::buffer& difference, float relaxation, const std::string& dtype,
                     const std::string& code, const py::buffer& packed, const py::buffer& absmax) {
    const std::size_t count = values_in(target, dtype);
    const pissa::FourBit stored = four_bit(count, code, packed, absmax, false);
    void* to = writable_bytes(target, count * size_of(parse_dtype(dtype)), "target");
    auto* from = static_cast<float*>(writable_bytes(difference, count * sizeof(float), "difference"));
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    pissa::relax_towards(kernels_, pool_, stored, parse_dtype(dtype), count, from, relaxation, to);
  }

  std::string kernel() const { return kernels_.name; }

 private:
  const pissa::Kernels& kernels_;
  pissa::ThreadPool pool_;
  std::mutex mutex_;
};

pissa::Buffer<double> copy_in(pissa::ThreadPool& pool, const py::buffer& buffer, std::size_t count, const char* name) {
  pissa::Buffer<double> copy(pool.scratch(), count);
  std::copy_n(static_cast<double*>(writable_bytes(buffer, count * sizeof(double), name)), count, copy.begin());
  return copy;
}

// For a backend that has its basis elsewhere: `gram` is size × size, `vectors` gets rank × size, both of double.
pissa::RitzTriplets rayleigh_ritz(const py::buffer& gram, std::size_t size, std::size_t rank, std::size_t block,
                                  bool exact, const py::buffer& vectors) {
  pissa::ThreadPool pool(1);
  pissa::Buffer<double> matrix = copy_in(pool, gram, size * size, "gram");
  auto* out = static_cast<double*>(writable_bytes(vectors, rank * size * sizeof(double), "vectors"));
  const py::gil_scoped_release release;
  pissa::RitzTriplets result =
      pissa::rayleigh_ritz(pissa::select_kernels(), pool, std::move(matrix), size, rank, block, exact);
  std::copy(result.vectors.begin(), result.vectors.end(), out);
  return result;
}

// And one that has found the eigenpairs too.
pissa::RitzTriplets ritz_triplets(const py::buffer& gram, std::size_t size, std::size_t block,
                                  const std::vector<double>& values, const py::buffer& vectors) {
  pissa::ThreadPool pool(1);
  const pissa::Buffer<double> matrix = copy_in(pool, gram, size * size, "gram");
  const pissa::Buffer<double> found = copy_in(pool, vectors, values.size() * size, "vectors");
  const py::gil_scoped_release release;
  return pissa::ritz_triplets(matrix, size, values.size(), block, values, found);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  pissa::lapack::scipy_openblas_set_num_threads(1);
  py::class_<pissa::SplitResult>(m, "SplitResult")
      .def_readonly("singular_values", &pissa::SplitResult::sigma)
      .def_readonly("weight_norm", &pissa::SplitResult::weight_norm)
      .def_readonly("rounding_error", &pissa::SplitResult::rounding_error)
      .def_readonly("estimated_deficit", &pissa::SplitResult::estimated_deficit)
      .def_readonly("passes", &pissa::SplitResult::passes)
      .def_readonly("block", &pissa::SplitResult::block)
      .def_readonly("householder", &pissa::SplitResult::householder)
      .def_readonly("int8", &pissa::SplitResult::int8)
      .def_readonly("sweep_seconds", &pissa::SplitResult::sweep_seconds)
      .def_readonly("ritz_seconds", &pissa::SplitResult::ritz_seconds)
      .def_readonly("residual_seconds", &pissa::SplitResult::residual_seconds);
  py::class_<Splitter>(m, "Splitter")
      .def(py::init<unsigned>(), py::arg("threads"))
      .def_property_readonly("kernel", &Splitter::kernel)
      .def("split", &Splitter::split, py::arg("weight"), py::arg("rows"), py::arg("cols"), py::arg("dtype"),
           py::arg("rank"), py::arg("scaling"), py::arg("fan_in_fan_out"), py::arg("a"), py::arg("b"),
           py::arg("adapter_dtype"), py::arg("passes"), py::arg("key"), py::arg("near") = false,
           py::arg("precise") = true)
      .def("correct", &Splitter::correct, py::arg("difference"), py::arg("rows"), py::arg("cols"), py::arg("rank"),
           py::arg("scaling"), py::arg("a"), py::arg("b"), py::arg("adapter_dtype"))
      .def("norm", &Splitter::norm, py::arg("values"), py::arg("dtype"))
      .def("nuclear_norm", &Splitter::nuclear_norm, py::arg("values"), py::arg("rows"), py::arg("cols"),
           py::arg("dtype"), py::arg("zeros"), py::arg("outside"))
      .def("quantise", &Splitter::quantise, py::arg("values"), py::arg("dtype"), py::arg("code"), py::arg("packed"),
           py::arg("absmax"), py::arg("nested_codes"), py::arg("nested_absmax"))
      .def("dequantise", &Splitter::dequantise, py::arg("out"), py::arg("dtype"), py::arg("code"), py::arg("packed"),
           py::arg("absmax"))
      .def("subtract_stored", &Splitter::subtract_stored, py::arg("values"), py::arg("values_dtype"), py::arg("out"),
           py::arg("dtype"), py::arg("code"), py::arg("packed"), py::arg("absmax"))
      .def("relax_towards", &Splitter::relax_towards, py::arg("target"), py::arg("difference"), py::arg("relaxation"),
           py::arg("dtype"), py::arg("code"), py::arg("packed"), py::arg("absmax"));
  m.def("workspace_bytes", &workspace_bytes, py::arg("rows"), py::arg("cols"), py::arg("dtype"), py::arg("rank"),
        py::arg("passes"), py::arg("threads"));
  m.def(
      "refit_workspace_bytes",
      [](std::size_t rows, std::size_t cols, std::size_t rank, unsigned threads) {
        return pissa::refit_workspace_bytes(describe(nullptr, "F32", rows, cols, rank), rank, threads);
      },
      py::arg("rows"), py::arg("cols"), py::arg("rank"), py::arg("threads"));
  m.def(
      "nuclear_norm_workspace_bytes",
      [](std::size_t rows, std::size_t cols, unsigned threads, std::size_t zeros) {
        return pissa::nuclear_norm_workspace_bytes({nullptr, pissa::DType::f32, rows, cols}, threads, zeros);
      },
      py::arg("rows"), py::arg("cols"), py::arg("threads"), py::arg("zeros"));
  m.def("code_values", [](const std::string& code) {
    const auto& values = code_named(code).values;
    return std::vector<float>(std::begin(values), std::end(values));
  });
  m.def("dynamic_map", [] { return std::vector<float>(pissa::dynamic_map(), pissa::dynamic_map() + 256); });
  m.def(
      "random_signs",
      [](std::uint64_t key, const py::buffer& out) {
        const auto count = static_cast<std::size_t>(out.request().size);
        pissa::random_signs(key, 0, count, static_cast<float*>(writable_bytes(out, count * sizeof(float), "out")));
      },
      py::arg("key"), py::arg("out"));
  py::class_<pissa::RitzTriplets>(m, "RitzTriplets")
      .def_readonly("sigma", &pissa::RitzTriplets::sigma)
      .def_readonly("estimated_deficit", &pissa::RitzTriplets::estimated_deficit)
      .def_readonly("convergence", &pissa::RitzTriplets::convergence);
  m.def("rayleigh_ritz", &rayleigh_ritz, py::arg("gram"), py::arg("size"), py::arg("rank"), py::arg("block"),
        py::arg("exact"), py::arg("vectors"));
  m.def("ritz_triplets", &ritz_triplets, py::arg("gram"), py::arg("size"), py::arg("block"), py::arg("values"),
        py::arg("vectors"));
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const pissa::Kernels* kernels : pissa::available_kernels()) names.emplace_back(kernels->name);
    return names;
  });
}
