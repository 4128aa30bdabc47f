// What is slow about data in Python: the orders and indices of samples and of blends, and reading samples along them.
//
// megatron_llm/data/index_numpy.py holds the same functions in numpy, with the same results bit for bit; see README.md
// in this folder. The work itself is in index/*.h; here arrays are checked and handed over.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "index/blend.h"
#include "index/sample_index.h"
#include "index/samples.h"
#include "index/shuffle.h"

namespace py = pybind11;

namespace {

using namespace index_builder;

// Conversions are refused (no forcecast): a silent copy of a 64-bit array into 32 bits would give a wrong index.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Shuffles `words`, any array of 4-byte numbers, as numpy.random.RandomState.shuffle would with the state `key`, `used`.
// `key` is changed to the state afterwards; returned is its `used`.
int shuffle(py::array words, Array<uint32_t> key, int used) {
  if (words.ndim() != 1 || words.itemsize() != 4 || !(words.flags() & py::array::c_style)) {
    throw std::invalid_argument("words must be 1-D and contiguous, of 4 bytes each");
  }
  if (static_cast<uint64_t>(words.shape(0)) > (uint64_t{1} << 32)) throw std::invalid_argument("words must be at most 2^32");
  if (key.ndim() != 1 || key.shape(0) != MersenneTwister::kWords) throw std::invalid_argument("key must have 624 words");
  uint32_t* data = static_cast<uint32_t*>(words.mutable_data());
  const auto count = static_cast<uint64_t>(words.shape(0));
  uint32_t* state = key.mutable_data();
  py::gil_scoped_release unlocked;
  MersenneTwister random(state, used);
  shuffle_words(data, count, random);
  return random.used();
}

template <typename Entry>
py::array_t<Entry> sample_index(const py::array& lengths, const Array<int32_t>& documents, int64_t seq_length,
                                int64_t samples, int64_t extra, int threads) {
  if (lengths.ndim() != 1 || documents.ndim() != 1) throw std::invalid_argument("lengths and documents must be 1-D");
  if (lengths.dtype().kind() != 'i' || lengths.itemsize() != 4 || (lengths.shape(0) > 1 && lengths.strides(0) != 4)) {
    throw py::type_error("lengths must be contiguous int32");
  }
  if (documents.shape(0) == 0) throw std::invalid_argument("there are no documents");
  if (seq_length < 1 || samples < 0 || extra < 0 || extra > 1) {
    throw std::invalid_argument("seq_length must be positive, samples not negative, extra 0 or 1");
  }
  py::array_t<Entry> out({static_cast<py::ssize_t>(samples + 1), static_cast<py::ssize_t>(2)});
  Entry* data = out.mutable_data();
  const Documents found = {static_cast<const char*>(lengths.data()), lengths.shape(0), documents.data(), documents.shape(0)};
  {
    py::gil_scoped_release unlocked;
    SampleIndexBuilder<Entry>(found, seq_length, samples, extra, data).run(std::max(threads, 1));
  }
  return out;
}

// How many samples early a stretch begins (0: as many as have been found to be enough).
int64_t early_for(size_t datasets, int64_t early) { return early > 0 ? early : std::max<int64_t>(512, 4 * static_cast<int64_t>(datasets)); }

void check_blend(py::ssize_t count, int64_t size, int64_t early, int width) {
  if (count < 1 || count > std::numeric_limits<int16_t>::max()) {
    throw std::invalid_argument("a blend has 1 to 32767 datasets, got " + std::to_string(count));
  }
  if (size < 0) throw std::invalid_argument("size must not be negative");
  if (early < 0) throw std::invalid_argument("early must not be negative");
  if (width != 0 && lane_walk(width) == nullptr) throw std::invalid_argument("no vectors of that width here");
}

py::tuple blend_index(const Array<double>& weights, int64_t size, int threads, int64_t early, int width) {
  check_blend(weights.size(), size, early, width);
  py::array_t<int16_t> datasets(static_cast<py::ssize_t>(size));
  py::array_t<int64_t> samples(static_cast<py::ssize_t>(size));
  int16_t* dataset_out = datasets.mutable_data();
  int64_t* sample_out = samples.mutable_data();
  const Weights found = {weights.data(), static_cast<size_t>(weights.size())};
  {
    py::gil_scoped_release unlocked;
    BlendBuilder(found, size, early_for(found.count, early), width, dataset_out, sample_out).run(threads);
  }
  return py::make_tuple(datasets, samples);
}

py::tuple exhaustive_blend_index(const Array<int64_t>& sizes, int threads, int64_t early, int width) {
  std::vector<int64_t> left(sizes.data(), sizes.data() + sizes.size());
  int64_t total = 0;
  for (const int64_t size : left) {
    if (size < 0) throw std::invalid_argument("sizes must not be negative");
    total += size;
  }
  check_blend(sizes.size(), total, early, width);
  py::array_t<int16_t> datasets(static_cast<py::ssize_t>(total));
  py::array_t<int64_t> samples(static_cast<py::ssize_t>(total));
  int16_t* dataset_out = datasets.mutable_data();
  int64_t* sample_out = samples.mutable_data();
  {
    py::gil_scoped_release unlocked;
    early = early_for(left.size(), early);
    walk_exhaustive(std::move(left), total, early, width, threads, dataset_out, sample_out);
  }
  return py::make_tuple(datasets, samples);
}

// Reads samples; holds the arrays it reads from.
class SampleReader {
 public:
  SampleReader(py::array tokens, py::array pointers, py::array lengths, py::array documents, py::array boundaries,
               py::array shuffle, int64_t seq_length, int64_t extra)
      : held_{tokens, pointers, lengths, documents, boundaries, shuffle} {
    if (seq_length < 1 || extra < 0 || extra > 1) throw std::invalid_argument("seq_length must be positive, extra 0 or 1");
    if (pointers.shape(0) != lengths.shape(0)) throw std::invalid_argument("as many pointers as lengths are needed");
    if (boundaries.ndim() != 2 || boundaries.shape(1) != 2) throw std::invalid_argument("boundaries must be [samples + 1, 2]");
    arrays_ = {numbers(tokens),    numbers(pointers),   numbers(lengths),  numbers(documents),
               numbers(boundaries), numbers(shuffle), seq_length + extra, extra};
  }

  // The ids of sample `number`, [seq_length + extra], padded with -1; None where the arrays do not fit together.
  py::object read(int64_t number) const {
    py::array_t<int64_t> out(static_cast<py::ssize_t>(arrays_.size));
    if (!arrays_.read(number, -1, out.mutable_data())) return py::none();
    return std::move(out);
  }

 private:
  static Numbers numbers(const py::array& array) {
    const char kind = array.dtype().kind();
    if ((kind != 'i' && kind != 'u') || (kind == 'u' && array.itemsize() == 8) || !(array.flags() & py::array::c_style)) {
      throw std::invalid_argument("arrays must be contiguous, of whole numbers that fit into 64 bits");
    }
    return {static_cast<const char*>(array.data()), array.size(), static_cast<int>(array.itemsize()), kind == 'i'};
  }

  std::vector<py::array> held_;
  SampleArrays arrays_;
};

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Orders and indices of samples and blends, and reading along them; megatron_llm.data.index_numpy has the same.";
  module.def("shuffle", &shuffle, py::arg("words").noconvert(), py::arg("key").noconvert(), py::arg("used"));
  module.def("sample_index_int32", &sample_index<int32_t>, py::arg("lengths").noconvert(), py::arg("documents").noconvert(),
             py::arg("seq_length"), py::arg("samples"), py::arg("extra"), py::arg("threads") = 1);
  module.def("sample_index_int64", &sample_index<int64_t>, py::arg("lengths").noconvert(), py::arg("documents").noconvert(),
             py::arg("seq_length"), py::arg("samples"), py::arg("extra"), py::arg("threads") = 1);
  module.def("blend_index", &blend_index, py::arg("weights").noconvert(), py::arg("size"), py::arg("threads") = 1,
             py::arg("early") = 0, py::arg("width") = 0);
  module.def("exhaustive_blend_index", &exhaustive_blend_index, py::arg("sizes").noconvert(),
             py::arg("threads") = 1, py::arg("early") = 0, py::arg("width") = 0);
  py::class_<SampleReader>(module, "SampleReader")
      .def(py::init<py::array, py::array, py::array, py::array, py::array, py::array, int64_t, int64_t>(), py::arg("tokens"),
           py::arg("pointers"), py::arg("lengths"), py::arg("documents"), py::arg("boundaries"), py::arg("shuffle"),
           py::arg("seq_length"), py::arg("extra"))
      .def("read", &SampleReader::read, py::arg("number"));
}
