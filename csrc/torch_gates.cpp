// Gates in C++ for Python: an autograd node (gate_node.h), and what a reader's hooks do in every row after the checking
// row. All other cases are handled by python/obc/scoring/reading/gates.py and module_readers.py. Besides, the operator
// channel_dot for small calls, whose checks take Python longer than the kernel.
//
// Nodes are not in LibTorch's stable ABI: this library works with the torch and Python that it was built for.

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string_view>
#include <typeinfo>

#include "gate_node.h"

namespace {

using namespace obc::gates;

bool gate_serves(PyObject* object) {
  if (!THPVariable_CheckExact(object) || !at::GradMode::is_enabled()) return false;
  const Tensor& activation = THPVariable_Unpack(object);
  return dtype_of(activation).has_value() && is_plain(activation) && !activation.is_inference() &&
         !torch::autograd::isFwGradDefined(activation);
}

// gate(activation, gate, channel_dim, per_sample, fold): Gate.apply of gates.py, or NotImplemented.
PyObject* gate_function(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "gate takes 5 arguments, got ", count);
  if (!gate_serves(args[0])) Py_RETURN_NOTIMPLEMENTED;
  const Tensor& activation = THPVariable_Unpack(args[0]);
  const int64_t channel_dim = PyLong_AsLongLong(args[2]), dims = activation.dim();
  const Dot dot = {channel_dim < 0 ? channel_dim + dims : channel_dim, args[3] == Py_True, PyLong_AsLongLong(args[4])};
  TORCH_CHECK_INDEX(
      0 <= dot.channel_dim && dot.channel_dim < dims,
      "obc: channel_dim ",
      channel_dim,
      " is outside an activation of ",
      dims,
      " dimensions"
  );
  return THPVariable_Wrap(pass_gate(activation, THPVariable_Unpack(args[1]), dot));
  END_HANDLE_TH_ERRORS
}

// --- channel_dot -------------------------------------------------------------------------------------------------

// Whether no mode, transform or trace sees the operators that this thread calls.
bool nothing_intercepts() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet usual(
      {DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA}
  );
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return ((local.included_ - local.excluded_).raw_repr() & ~usual.raw_repr()) == 0 &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

bool is_recorded(const Tensor& tensor) {
  return (at::GradMode::is_enabled() && tensor.requires_grad()) || torch::autograd::isFwGradDefined(tensor);
}

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// channel_dot(activation, grad, channel_dim, per_sample): the operator's result for arguments without fault that only
// the kernel has to see, or NotImplemented. python/obc/ops/channel_dot.py checks and dispatches all others.
PyObject* channel_dot_function(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4, "channel_dot takes 4 arguments, got ", count);
  const bool typed = THPVariable_CheckExact(args[0]) && THPVariable_CheckExact(args[1]) && PyLong_CheckExact(args[2]) &&
                     PyBool_Check(args[3]);
  if (!typed || !nothing_intercepts()) Py_RETURN_NOTIMPLEMENTED;
  const Tensor &activation = THPVariable_Unpack(args[0]), &grad = THPVariable_Unpack(args[1]);
  const int64_t dims = activation.dim(), counted = PyLong_AsLongLong(args[2]);
  if (counted == -1 && PyErr_Occurred()) throw python_error();
  const Dot dot = {counted < 0 ? counted + dims : counted, args[3] == Py_True, /*fold=*/1};
  if (dot.channel_dim < 0 || dot.channel_dim >= dims || (dot.per_sample && dot.channel_dim == 0) ||
      !dtype_of(activation).has_value() || !kernel_serves(activation, grad) || is_recorded(activation) ||
      is_recorded(grad)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const int64_t channels = activation.size(dot.channel_dim);
  const auto options = activation.options().dtype(accumulation_dtype(activation));
  Tensor sums;
  {
    const WithoutGil unlocked;
    const at::AutoDispatchBelowADInplaceOrView below;
    sums = dot.per_sample ? at::empty({activation.size(0), channels}, options) : at::empty({channels}, options);
    run_kernel(activation, grad, dot, sums.mutable_data_ptr());
  }
  return THPVariable_Wrap(sums);
  END_HANDLE_TH_ERRORS
}

// --- the hooks of a reader in every row after the checking row --------------------------------------------------

struct PyDecref {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Object = std::unique_ptr<PyObject, PyDecref>;

Object own(PyObject* borrowed) {
  Py_INCREF(borrowed);
  return Object(borrowed);
}

Object checked(PyObject* made) {
  if (made == nullptr) throw python_error();
  return Object(made);
}

// One step back from a node. The name of a C++ class is compared only once; after that its type is compared.
struct Step {
  std::string name;
  size_t input;
  const std::type_info* seen = nullptr;

  bool fits(const Node& node) {
    const std::type_info& type = typeid(node);
    if (seen != nullptr && *seen == type) return true;
    if (node.name() != name) return false;
    // Python's classes share one type, which is not exported; only their names differ.
    if (std::string_view(type.name()).find("PyNode") == std::string_view::npos) seen = &type;
    return true;
  }
};

// A chain that an input checks, as Candidate.holds in chain_candidates.py does.
struct Link {
  Object slot;
  bool ends_here;       // the slot belongs to this input
  Object norm, weight;  // null if there is no norm between
  std::vector<Step> steps;

  // `outputs` is Chains.outputs.
  bool holds(NodePtr node, PyObject* outputs) {
    for (Step& step : steps) {
      if (node == nullptr || !step.fits(*node) || step.input >= node->num_outputs()) return false;
      node = NodePtr(node->next_edge(step.input).function);
    }
    if (norm) {
      if (node == nullptr || !is_norm(*node)) return false;
      node = NodePtr(node->next_edge(0).function);
    }
    if (ends_here) return true;
    PyObject* noted = PyDict_GetItemWithError(outputs, slot.get());
    if (noted == nullptr) {
      if (PyErr_Occurred()) throw python_error();
      return false;
    }
    if (node == nullptr) return noted == Py_None;
    const Object reached = checked(torch::autograd::functionToPyObject(node));
    return noted == reached.get();
  }

 private:
  bool is_norm(const Node& node) const {
    const Object training = checked(PyObject_GetAttrString(norm.get(), "training"));
    if (training.get() != Py_False || node.num_outputs() < 2) return false;
    if (node.name().find("BatchNorm") == std::string::npos) return false;
    const Node* leaf = node.next_edge(1).function.get();
    if (leaf == nullptr || typeid(*leaf) != typeid(AccumulateGrad)) return false;
    const Tensor& read = static_cast<const AccumulateGrad*>(leaf)->variable;
    return read.unsafeGetTensorImpl() == THPVariable_Unpack(weight.get()).unsafeGetTensorImpl();
  }
};

// The gate of one side of a module. Its calls return what the hook returns, or NotImplemented if anything differs from
// the checking row: then gates.py and module_readers.py decide.
struct Gate {
  Object slot, outputs, held;
  Tensor gate;  // undefined if the row follows from another
  int64_t channel_dim = -1, channels = 0, fold = 1;
  bool copy_before = false, copy_after = false;
  std::vector<Link> links;

  bool links_hold(const Tensor& activation) {
    if (links.empty()) return true;
    const NodePtr node = NodePtr(activation.grad_fn());
    for (Link& link : links) {
      if (!link.holds(node, outputs.get())) return false;
    }
    for (const Link& link : links) {
      if (PySet_Add(held.get(), link.slot.get()) < 0) throw python_error();
    }
    return true;
  }

  bool fits(const Tensor& activation) const {
    const int64_t dim = activation.dim() + channel_dim;
    return 0 <= dim && dim < activation.dim() && activation.size(dim) == channels;
  }

  Tensor pass(const Tensor& activation) const {
    const Dot dot = {activation.dim() + channel_dim, /*per_sample=*/false, fold};
    const Tensor gated = pass_gate(copy_before ? activation.clone() : activation, gate, dot);
    return copy_after ? gated.clone() : gated;
  }
};

struct GateObject {
  PyObject_HEAD Gate* self;
};

Gate& gate_of(PyObject* object) { return *reinterpret_cast<GateObject*>(object)->self; }

Link parse_link(PyObject* tuple) {
  PyObject *slot, *norm, *weight, *steps;
  int ends_here;
  if (!PyArg_ParseTuple(tuple, "OpOOO!", &slot, &ends_here, &norm, &weight, &PyTuple_Type, &steps))
    throw python_error();
  Link link = {own(slot), ends_here != 0, nullptr, nullptr, {}};
  if (norm != Py_None) {
    TORCH_CHECK_TYPE(THPVariable_Check(weight), "obc: a norm's weight must be a tensor");
    link.norm = own(norm);
    link.weight = own(weight);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(steps); ++i) {
    const char* name;
    Py_ssize_t input;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(steps, i), "sn", &name, &input)) throw python_error();
    link.steps.push_back({name, static_cast<size_t>(input)});
  }
  return link;
}

PyObject* gate_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  static const char* const names[] = {
      "slot",
      "gate",
      "channel_dim",
      "channels",
      "fold",
      "copy_before",
      "copy_after",
      "outputs",
      "held",
      "links",
      nullptr
  };
  PyObject *slot, *gate, *outputs, *held, *links;
  long long channel_dim, channels, fold;
  int copy_before, copy_after;
  if (!PyArg_ParseTupleAndKeywords(
          args,
          kwargs,
          "OOLLLppO!O!O!",
          const_cast<char**>(names),
          &slot,
          &gate,
          &channel_dim,
          &channels,
          &fold,
          &copy_before,
          &copy_after,
          &PyDict_Type,
          &outputs,
          &PySet_Type,
          &held,
          &PyTuple_Type,
          &links
      )) {
    return nullptr;
  }
  TORCH_CHECK_TYPE(gate == Py_None || THPVariable_Check(gate), "obc: gate must be a tensor or None");
  TORCH_CHECK_VALUE(channel_dim < 0, "obc: channel_dim counts from the end, got ", channel_dim);
  auto made = std::make_unique<Gate>();
  made->slot = own(slot);
  made->outputs = own(outputs);
  made->held = own(held);
  if (gate != Py_None) made->gate = THPVariable_Unpack(gate);
  made->channel_dim = channel_dim;
  made->channels = channels;
  made->fold = fold;
  made->copy_before = copy_before != 0;
  made->copy_after = copy_after != 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(links); ++i) {
    made->links.push_back(parse_link(PyTuple_GET_ITEM(links, i)));
  }
  Object object = checked(type->tp_alloc(type, 0));
  reinterpret_cast<GateObject*>(object.get())->self = made.release();
  return object.release();
  END_HANDLE_TH_ERRORS
}

void gate_dealloc(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  delete reinterpret_cast<GateObject*>(object)->self;
  type->tp_free(object);
  Py_DECREF(type);
}

// before(args, kwargs): what a forward pre-hook returns.
PyObject* gate_before(PyObject* object, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && PyTuple_Check(args[0]), "before takes args and kwargs");
  Gate& self = gate_of(object);
  if (PyTuple_GET_SIZE(args[0]) == 0) Py_RETURN_NOTIMPLEMENTED;
  PyObject* const first = PyTuple_GET_ITEM(args[0], 0);
  if (!gate_serves(first)) Py_RETURN_NOTIMPLEMENTED;
  const Tensor& activation = THPVariable_Unpack(first);
  if (!self.fits(activation) || !self.links_hold(activation)) Py_RETURN_NOTIMPLEMENTED;
  if (!self.gate.defined()) Py_RETURN_NONE;
  Object gated = checked(THPVariable_Wrap(self.pass(activation)));
  const Py_ssize_t size = PyTuple_GET_SIZE(args[0]);
  Object positional = checked(PyTuple_New(size));
  PyTuple_SET_ITEM(positional.get(), 0, gated.release());
  for (Py_ssize_t i = 1; i < size; ++i) {
    PyTuple_SET_ITEM(positional.get(), i, own(PyTuple_GET_ITEM(args[0], i)).release());
  }
  return PyTuple_Pack(2, positional.get(), args[1]);
  END_HANDLE_TH_ERRORS
}

// after(output): what a forward hook returns.
PyObject* gate_after(PyObject* object, PyObject* output) {
  HANDLE_TH_ERRORS
  Gate& self = gate_of(object);
  if (!gate_serves(output)) Py_RETURN_NOTIMPLEMENTED;
  const Tensor& activation = THPVariable_Unpack(output);
  if (!self.fits(activation)) Py_RETURN_NOTIMPLEMENTED;
  if (self.gate.defined()) return THPVariable_Wrap(self.pass(activation));
  const Object node = checked(torch::autograd::functionToPyObject(NodePtr(activation.grad_fn())));
  if (PyDict_SetItem(self.outputs.get(), self.slot.get(), node.get()) < 0) throw python_error();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef gate_methods[] = {
    {"before",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(gate_before)),
     METH_FASTCALL,
     "before(args, kwargs): what a forward pre-hook returns, or NotImplemented"},
    {"after", gate_after, METH_O, "after(output): what a forward hook returns, or NotImplemented"},
    {nullptr, nullptr, 0, nullptr}
};

PyType_Slot gate_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(gate_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(gate_dealloc)},
    {Py_tp_methods, gate_methods},
    {Py_tp_doc, const_cast<char*>("One side's gate of a module, or its chain, in rows after the checking one")},
    {0, nullptr}
};

PyType_Spec gate_type = {"obc_gates.Gate", sizeof(GateObject), 0, Py_TPFLAGS_DEFAULT, gate_slots};

PyMethodDef functions[] = {
    {"gate",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(gate_function)),
     METH_FASTCALL,
     "gate(activation, gate, channel_dim, per_sample, fold): an identity that reads a row, or NotImplemented"},
    {"channel_dot",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(channel_dot_function)),
     METH_FASTCALL,
     "channel_dot(activation, grad, channel_dim, per_sample): the operator's result, or NotImplemented"},
    {nullptr, nullptr, 0, nullptr}
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "obc_gates", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr
};

}  // namespace

PyMODINIT_FUNC PyInit_obc_gates() {
  PyObject* module = PyModule_Create(&definition);
  PyObject* type = PyType_FromSpec(&gate_type);
  if (module == nullptr || type == nullptr || PyModule_AddObject(module, "Gate", type) < 0) {
    Py_XDECREF(module);
    Py_XDECREF(type);
    return nullptr;
  }
  return module;
}
