// The calls of a step, prepared: what askew_cuda/plan.py has worked out and checked, made in one go.
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>

#include "plan.h"
#include "prepared.h"

namespace py = pybind11;

namespace askew {
namespace {

template <typename Element> c10::IValue list_of(py::handle value) {
  return c10::IValue(value.cast<std::vector<Element>>());
}

// An argument of an operator: a number, a word, a tensor, or a list of one kind that is not empty.
c10::IValue value_of(py::handle value) {
  if (value.is_none()) return {};
  if (py::isinstance<py::bool_>(value)) return value.cast<bool>();
  if (py::isinstance<py::float_>(value)) return value.cast<double>();
  if (py::isinstance<py::int_>(value)) return value.cast<int64_t>();
  if (py::isinstance<py::str>(value)) return value.cast<std::string>();
  if (THPVariable_Check(value.ptr())) return value.cast<at::Tensor>();
  const py::object first = value[py::int_(0)];
  if (THPVariable_Check(first.ptr())) return list_of<at::Tensor>(value);
  return py::isinstance<py::int_>(first) ? list_of<int64_t>(value) : list_of<double>(value);
}

class Plan {
 public:
  explicit Plan(const std::vector<std::pair<std::string, py::dict>>& calls) {
    for (const auto& [name, given] : calls) {
      Arguments arguments(name == "sgd_" ? Rule::sgd : Rule::adamw);
      for (const auto& [key, value] : given) {
        if (py::isinstance<py::sequence>(value) && !py::isinstance<py::str>(value) && py::len(value) == 0) continue;
        arguments.set(key.cast<std::string>(), value_of(value));
      }
      calls_.emplace_back(std::move(arguments));
    }
  }

  void set(size_t call, const py::dict& changed) {
    for (const auto& [key, value] : changed) calls_.at(call).set(key.cast<std::string>(), value_of(value));
  }

  bool take_gradients(const std::map<size_t, std::vector<at::Tensor>>& given) {
    bool same = true;
    for (size_t i = 0; i < calls_.size(); ++i) {
      const auto mine = given.find(i);
      same = calls_[i].take_gradients(mine == given.end() ? nullptr : &mine->second) && same;
    }
    return same;
  }

  void lay_out() {
    for (PreparedCall& call : calls_) call.lay_out();
  }

  // The steps, and then the entries of dictionaries that go with them: (dictionary, key, value). Python's signal
  // handlers run between two lines of Python, so that nothing interrupts this.
  void run(const std::vector<std::tuple<py::dict, py::str, py::object>>& entries) {
    {
      const py::gil_scoped_release released;
      for (PreparedCall& call : calls_) {
        RECORD_FUNCTION(call.rule() == Rule::sgd ? "askew_cuda::sgd_" : "askew_cuda::adamw_",
                        c10::ArrayRef<const c10::IValue>{});
        call.run();
      }
    }
    for (const auto& [dictionary, key, value] : entries) dictionary[key] = value;
  }

 private:
  std::vector<PreparedCall> calls_;
};

}  // namespace

void bind_plan(py::module_& m) {
  py::class_<Plan>(
      m, "Plan",
      "Calls of sgd_ and adamw_ that are made together, again and again: [(operator, its arguments by name)].")
      .def(py::init<const std::vector<std::pair<std::string, py::dict>>&>(), py::arg("calls"))
      .def("set", torch::wrap_pybind_function(&Plan::set), py::arg("call"), py::arg("changed"),
           "Other values for arguments of one call.")
      .def(
          "take_gradients", torch::wrap_pybind_function_no_gil(&Plan::take_gradients), py::arg("given") = py::dict(),
          "The weights' gradients as they are now, or those that are given, by the number of their call. False where a "
          "tensor, or a gradient, is not of the kind or in the place that the calls were made for: then they must not "
          "be run.")
      .def("lay_out", torch::wrap_pybind_function_no_gil(&Plan::lay_out), "All that can fail, before run().")
      .def("run", torch::wrap_pybind_function(&Plan::run), py::arg("entries") = py::list(),
           "All calls, and then entries of dictionaries: [(dictionary, key, value)].");
}

}  // namespace askew
