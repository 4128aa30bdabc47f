// Builders of the sample index and of the blending index.
//
// Both are one pass over arrays far larger than the caches, so they are bound by memory latency; in Python they
// would be bound by the interpreter. megatron_llm/data/index_numpy.py holds the same functions in numpy, with the same
// results bit for bit; see README.md in this folder.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// Conversions are refused (no forcecast): a silent copy of a 64-bit array into 32 bits would give a wrong index.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

inline void prefetch(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

// Fills `out` with `samples` + 1 boundaries (place in `documents`, offset inside that document).
//
// The documents, in the given order, form one stream of tokens. Sample k is stream tokens [k * seq_length,
// (k + 1) * seq_length + extra). Boundary k > 0 lies at the last token of sample k - 1: with the extra token that is
// also the first of sample k; without it, just past its last. Boundary 0 is (0, 0) even when the first document is
// empty. A boundary past the end of the stream (the partial last sample) lies at the end of the last document.
template <typename Entry>
void fill_sample_index(const int32_t* lengths, int64_t length_count, const int32_t* documents, int64_t document_count,
                       int64_t seq_length, int64_t samples, int64_t extra, Entry* out) {
  constexpr int64_t kAhead = 24;  // document lengths are read in shuffled order: ask for them before they are needed
  out[0] = 0;
  out[1] = 0;
  int64_t boundary = 1;
  int64_t target = seq_length + extra - 1;  // stream position of the last token of sample `boundary` - 1
  int64_t start = 0;                        // stream position of the first token of the current document
  for (int64_t place = 0; place < document_count && boundary <= samples; ++place) {
    if (place + kAhead < document_count) {
      const uint32_t next = static_cast<uint32_t>(documents[place + kAhead]);
      if (next < static_cast<uint64_t>(length_count)) prefetch(lengths + next);
    }
    const int32_t document = documents[place];
    if (document < 0 || document >= length_count) {
      throw std::out_of_range("document " + std::to_string(document) + " is outside the " +
                              std::to_string(length_count) + " known lengths");
    }
    const int64_t end = start + lengths[document];
    for (; target < end && boundary <= samples; ++boundary, target += seq_length) {
      out[2 * boundary] = static_cast<Entry>(place);
      out[2 * boundary + 1] = static_cast<Entry>(target - start + 1 - extra);
    }
    start = end;
  }
  for (; boundary <= samples; ++boundary) {
    out[2 * boundary] = static_cast<Entry>(document_count - 1);
    out[2 * boundary + 1] = static_cast<Entry>(lengths[documents[document_count - 1]] - extra);
  }
}

template <typename Entry>
py::array_t<Entry> sample_index(const Array<int32_t>& lengths, const Array<int32_t>& documents, int64_t seq_length,
                                int64_t samples, int64_t extra) {
  if (lengths.ndim() != 1 || documents.ndim() != 1) throw std::invalid_argument("lengths and documents must be 1-D");
  if (documents.shape(0) == 0) throw std::invalid_argument("there are no documents");
  if (seq_length < 1 || samples < 0 || extra < 0 || extra > 1) {
    throw std::invalid_argument("seq_length must be positive, samples not negative, extra 0 or 1");
  }
  py::array_t<Entry> out({static_cast<py::ssize_t>(samples + 1), static_cast<py::ssize_t>(2)});
  Entry* data = out.mutable_data();
  {
    py::gil_scoped_release unlocked;
    fill_sample_index<Entry>(lengths.data(), lengths.shape(0), documents.data(), documents.shape(0), seq_length,
                             samples, extra, data);
  }
  return out;
}

// Which dataset gives sample n: the one furthest behind its share weight * max(n, 1); the first of equals. The sum
// weight * n - taken is kept as two rounded operations (no fused multiply-add: setup.py turns contraction off), for
// numpy rounds twice.
class Deficits {
 public:
  explicit Deficits(std::vector<double> weights) : weights_(std::move(weights)), taken_(weights_.size(), 0.0) {}

  // The dataset furthest behind among `open`.
  size_t furthest(int64_t sample, const std::vector<size_t>& open) const {
    const double position = static_cast<double>(std::max<int64_t>(sample, 1));
    size_t best = open.front();
    double largest = std::numeric_limits<double>::lowest();
    for (const size_t dataset : open) {
      const double expected = weights_[dataset] * position;
      const double deficit = expected - taken_[dataset];
      if (deficit > largest) {
        largest = deficit;
        best = dataset;
      }
    }
    return best;
  }

  // Counts one more sample from `dataset`; returns how many were taken before.
  int64_t take(size_t dataset) {
    const double before = taken_[dataset];
    taken_[dataset] = before + 1.0;
    return static_cast<int64_t>(before);
  }

 private:
  std::vector<double> weights_;
  std::vector<double> taken_;  // whole numbers below 2^53, so exact
};

void check_dataset_count(py::ssize_t count) {
  if (count < 1 || count > std::numeric_limits<int16_t>::max()) {
    throw std::invalid_argument("a blend has 1 to 32767 datasets, got " + std::to_string(count));
  }
}

py::tuple blend_index(const Array<double>& weights, int64_t size) {
  check_dataset_count(weights.size());
  if (size < 0) throw std::invalid_argument("size must not be negative");
  py::array_t<int16_t> datasets(static_cast<py::ssize_t>(size));
  py::array_t<int64_t> samples(static_cast<py::ssize_t>(size));
  int16_t* dataset_out = datasets.mutable_data();
  int64_t* sample_out = samples.mutable_data();
  {
    py::gil_scoped_release unlocked;
    Deficits deficits(std::vector<double>(weights.data(), weights.data() + weights.size()));
    std::vector<size_t> open(static_cast<size_t>(weights.size()));
    for (size_t i = 0; i < open.size(); ++i) open[i] = i;
    for (int64_t sample = 0; sample < size; ++sample) {
      const size_t dataset = deficits.furthest(sample, open);
      dataset_out[sample] = static_cast<int16_t>(dataset);
      sample_out[sample] = deficits.take(dataset);
    }
  }
  return py::make_tuple(datasets, samples);
}

py::tuple exhaustive_blend_index(const Array<int64_t>& sizes) {
  check_dataset_count(sizes.size());
  std::vector<int64_t> left(sizes.data(), sizes.data() + sizes.size());
  int64_t total = 0;
  for (const int64_t size : left) {
    if (size < 0) throw std::invalid_argument("sizes must not be negative");
    total += size;
  }
  std::vector<double> weights;
  std::vector<size_t> open;
  for (size_t i = 0; i < left.size(); ++i) {
    weights.push_back(static_cast<double>(left[i]) / static_cast<double>(total));
    if (left[i] > 0) open.push_back(i);
  }
  py::array_t<int16_t> datasets(static_cast<py::ssize_t>(total));
  py::array_t<int64_t> samples(static_cast<py::ssize_t>(total));
  int16_t* dataset_out = datasets.mutable_data();
  int64_t* sample_out = samples.mutable_data();
  {
    py::gil_scoped_release unlocked;
    Deficits deficits(std::move(weights));
    for (int64_t sample = 0; sample < total; ++sample) {
      const size_t dataset = deficits.furthest(sample, open);
      dataset_out[sample] = static_cast<int16_t>(dataset);
      sample_out[sample] = deficits.take(dataset);
      if (--left[dataset] == 0) open.erase(std::find(open.begin(), open.end(), dataset));
    }
  }
  return py::make_tuple(datasets, samples);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Sample and blending index builders; megatron_llm.data.index_numpy has the same functions.";
  module.def("sample_index_int32", &sample_index<int32_t>, py::arg("lengths").noconvert(), py::arg("documents").noconvert(),
             py::arg("seq_length"), py::arg("samples"), py::arg("extra"));
  module.def("sample_index_int64", &sample_index<int64_t>, py::arg("lengths").noconvert(), py::arg("documents").noconvert(),
             py::arg("seq_length"), py::arg("samples"), py::arg("extra"));
  module.def("blend_index", &blend_index, py::arg("weights").noconvert(), py::arg("size"));
  module.def("exhaustive_blend_index", &exhaustive_blend_index, py::arg("sizes").noconvert());
}
