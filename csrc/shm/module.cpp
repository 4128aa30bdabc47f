// Python's door to the backend: `create` for torch.distributed, `reduce` for tests of the arithmetic alone.
#include <torch/csrc/utils/pybind.h>
#include <pybind11/chrono.h>
#include <pybind11/stl.h>

#include "backend.h"

namespace {

c10::intrusive_ptr<c10d::Backend> create(
    const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::chrono::milliseconds timeout, std::vector<int64_t> names,
    bool crowded) {
  return c10::make_intrusive<shm::ShmBackend>(store, rank, size, timeout, std::move(names), crowded);
}

}  // namespace

PYBIND11_MODULE(_shm, module) {
  pybind11::module_::import("torch.distributed");  // registers the types below
  module.def(
      "create", &create, pybind11::arg("store"), pybind11::arg("rank"), pybind11::arg("size"), pybind11::arg("timeout"),
      pybind11::arg("names"), pybind11::arg("crowded"), pybind11::call_guard<pybind11::gil_scoped_release>());
}
