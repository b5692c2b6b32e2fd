// The Python face of the core: arguments are checked here (what depends on the state of a loss, in loss.cpp), and the
// GIL is released for as long as a call works.
#include <torch/csrc/utils/pybind.h>

#include "embeddings.h"
#include "lars.h"
#include "loss.h"

namespace py = pybind11;

namespace {

void check_matrix(const at::Tensor& t, const char* name, int64_t dims) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": a CPU tensor is expected, found one on ", t.device());
  TORCH_CHECK_VALUE(
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name, ": float32 or float64 is expected, found ",
      t.scalar_type());
  TORCH_CHECK_VALUE(
      t.dim() == dims && t.numel() > 0, name, ": ", dims, " dimensions, none empty, are expected, found ", t.sizes());
}

void check_same(const at::Tensor& a, const at::Tensor& b, const char* name) {
  TORCH_CHECK_VALUE(
      a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type(), name, ": ", b.scalar_type(), b.sizes(),
      " differs from ", a.scalar_type(), a.sizes());
}

std::tuple<at::Tensor, at::Tensor> normalize(const at::Tensor& x, const at::Tensor& y) {
  check_matrix(x, "x", 2);
  check_matrix(y, "y", 2);
  check_same(x, y, "y");
  return dogo::normalize(x, y);
}

void check_tau(const std::optional<double>& tau, const char* name) {
  // Wider, and float32 could not hold 1 / tau beside the cosine that stands for pairs which do not count.
  TORCH_CHECK_VALUE(
      !tau || (*tau >= 1e-20 && *tau <= 1e20), name, ": between 1e-20 and 1e20 is expected, found ", *tau);
}

std::unique_ptr<dogo::Loss> make_loss(
    const std::vector<at::Tensor>& z, int64_t world, int64_t rank, std::optional<double> tau_contrast,
    std::optional<double> tau_distill, std::vector<double> weights, bool mean) {
  TORCH_CHECK_VALUE(z.size() == 1 || z.size() == 2, "z: one peer or two are expected, found ", z.size());
  for (const auto& unit : z) {
    check_matrix(unit, "z", 3);
    TORCH_CHECK_VALUE(
        unit.size(0) == 2 && unit.is_contiguous(), "z: contiguous [2, N, D] is expected, found ", unit.sizes());
    TORCH_CHECK_VALUE(
        unit.size(1) == z[0].size(1) && unit.scalar_type() == z[0].scalar_type(), "z: peers of ", z[0].size(1), " ",
        z[0].scalar_type(), " and ", unit.size(1), " ", unit.scalar_type(), " images");
  }
  const int64_t N = z[0].size(1);
  TORCH_CHECK_VALUE(world >= 1 && rank >= 0 && rank < world, "rank: ", rank, " of ", world, " ranks");
  TORCH_CHECK_VALUE(
      N % world == 0 && N >= 2, "z: ", N, " images, at least 2 and the same number on each of ", world,
      " ranks are needed");
  TORCH_CHECK_VALUE(tau_contrast || tau_distill, "tau_contrast, tau_distill: at least one is needed");
  check_tau(tau_contrast, "tau_contrast");
  check_tau(tau_distill, "tau_distill");
  TORCH_CHECK_VALUE(!tau_distill || z.size() == 2, "tau_distill: two peers are needed, found ", z.size());
  TORCH_CHECK_VALUE(weights.size() == z.size(), "weights: one a peer is expected, found ", weights.size());
  for (const double weight : weights) TORCH_CHECK_VALUE(std::isfinite(weight), "weights: not finite, found ", weight);
  return dogo::make_loss(z, {N / world, world, rank, tau_contrast, tau_distill, std::move(weights), mean});
}

// -- LARS

dogo::LarsGroup make_lars_group(
    double lr, std::optional<at::Tensor> lr_tensor, double momentum, double weight_decay, double eta, bool adapt,
    bool lr_in_momentum) {
  TORCH_CHECK_VALUE(
      !lr_tensor || (lr_tensor->dim() == 0 && lr_tensor->scalar_type() == at::kFloat),
      "lr_tensor: a 0-d float32 tensor is expected, found ", lr_tensor->scalar_type(), lr_tensor->sizes());
  return {lr, std::move(lr_tensor), momentum, weight_decay, eta, adapt, lr_in_momentum};
}

void check_lars_tensor(const at::Tensor& t, const char* name, size_t i, const at::Tensor& param, bool bfloat16_too) {
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, "[", i, "]: a dense tensor is expected, found ", t.layout());
  const auto dtype = t.scalar_type();
  TORCH_CHECK_VALUE(
      dtype == at::kFloat || (bfloat16_too && dtype == at::kBFloat16), name, "[", i, "]: float32",
      bfloat16_too ? " or bfloat16" : "", " is expected, found ", dtype);
  TORCH_CHECK_VALUE(
      t.sizes() == param.sizes() && t.device() == param.device(), name, "[", i, "]: ", t.sizes(), " on ", t.device(),
      " differs from its parameter's ", param.sizes(), " on ", param.device());
}

void check_lars(const dogo::LarsTensors& tensors, const std::vector<dogo::LarsGroup>& groups) {
  const auto& [params, grads, momenta, group_of] = tensors;
  TORCH_CHECK_VALUE(
      grads.size() == params.size() && momenta.size() == params.size() && group_of.size() == params.size(),
      "params, grads, momenta, groups: as many of each are expected, found ", params.size(), ", ", grads.size(), ", ",
      momenta.size(), ", ", group_of.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const auto device = params[0].device();
    TORCH_CHECK_VALUE(params[i].device() == device, "params[", i, "]: ", params[i].device(), " differs from ", device);
    check_lars_tensor(params[i], "params", i, params[i], false);
    check_lars_tensor(grads[i], "grads", i, params[i], true);
    const auto g = group_of[i];
    TORCH_CHECK_VALUE(g >= 0 && g < static_cast<int64_t>(groups.size()), "groups[", i, "]: ", g, " of ", groups.size());
    TORCH_CHECK_VALUE(
        momenta[i].defined() == (groups[g].momentum != 0), "momenta[", i, "]: one is expected where momentum is not 0");
    if (momenta[i].defined()) check_lars_tensor(momenta[i], "momenta", i, params[i], false);
    const auto& lr = groups[g].lr_tensor;
    TORCH_CHECK_VALUE(!lr || lr->device() == device, "lr_tensor: ", device, " is expected, found ", lr->device());
  }
}

void lars_step(
    dogo::Lars& lars, std::vector<at::Tensor> params, std::vector<at::Tensor> grads,
    std::vector<std::optional<at::Tensor>> momenta, std::vector<int64_t> group_of,
    const std::vector<dogo::LarsGroup>& groups) {
  dogo::LarsTensors tensors{std::move(params), std::move(grads), {}, std::move(group_of)};
  tensors.momenta.reserve(momenta.size());
  for (auto& momentum : momenta) tensors.momenta.push_back(momentum ? std::move(*momentum) : at::Tensor());
  check_lars(tensors, groups);
  lars.step(tensors, groups);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("has_cuda") = DOGO_CUDA != 0;
  m.attr("left_out") = DOGO_LEFT_OUT;  // why there is no CUDA part
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("normalize", &normalize, release(), py::arg("x"), py::arg("y"));
  py::class_<dogo::Loss>(m, "Loss")
      .def(
          py::init(&make_loss), release(), py::arg("z"), py::kw_only(), py::arg("world"), py::arg("rank"),
          py::arg("tau_contrast"), py::arg("tau_distill"), py::arg("weights"), py::arg("mean"))
      .def_property_readonly("needs_maxima", &dogo::Loss::needs_maxima)
      .def("maxima", &dogo::Loss::maxima, release())
      .def("sums", &dogo::Loss::sums, release())
      .def("finish", &dogo::Loss::finish, release(), py::arg("inverse_norms"));
  py::class_<dogo::LarsGroup>(m, "LarsGroup")
      .def(
          py::init(&make_lars_group), py::kw_only(), py::arg("lr"), py::arg("lr_tensor"), py::arg("momentum"),
          py::arg("weight_decay"), py::arg("eta"), py::arg("adapt"), py::arg("lr_in_momentum"));
  py::class_<dogo::Lars>(m, "Lars")
      .def(py::init([](const std::string& device) { return dogo::make_lars(at::Device(device)); }), py::arg("device"))
      .def(
          "step", &lars_step, release(), py::arg("params"), py::arg("grads"), py::arg("momenta"), py::arg("group_of"),
          py::arg("groups"));
}
