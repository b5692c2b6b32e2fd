// The Python face of the core: arguments are checked here (what depends on the state of a loss, in loss.cpp), and the
// GIL is released for as long as a call works.
#include <ATen/ops/empty.h>
#include <pybind11/numpy.h>
#include <torch/csrc/utils/pybind.h>

#include "augment.h"
#include "embeddings.h"
#include "lars.h"
#include "loss.h"
#include "philox.h"

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

// -- views

template <typename T>
using Rows = py::array_t<T, py::array::c_style>;  // [m, ...]; augment.py made them so

std::vector<dogo::SourceImage> source_images(const std::vector<py::array>& arrays) {
  std::vector<dogo::SourceImage> images;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const py::array& a = arrays[i];
    const std::string dtype = py::str(a.dtype());
    TORCH_CHECK_VALUE(dtype == "uint8", "images[", i, "]: uint8 is expected, found ", dtype);
    const at::IntArrayRef shape(reinterpret_cast<const int64_t*>(a.shape()), a.ndim());
    TORCH_CHECK_VALUE(
        a.ndim() == 3 && shape[0] > 0 && shape[1] > 0 && shape[2] == 3, "images[", i,
        "]: [height, width, 3] is expected, found ", shape);
    TORCH_CHECK_VALUE(a.flags() & py::array::c_style, "images[", i, "]: contiguous pixels are expected");
    images.push_back({static_cast<const uint8_t*>(a.data()), shape[0], shape[1]});
  }
  return images;
}

void check_view(const dogo::View& view, int64_t i, const std::vector<dogo::SourceImage>& images) {
  const auto n = static_cast<int64_t>(images.size());
  TORCH_CHECK_VALUE(
      view.source >= 0 && view.source < n, "source[", i, "]: one of ", n, " images is expected, found ", view.source);
  const auto& [pixels, height, width] = images[view.source];
  const auto inside = [](int64_t first, int64_t length, int64_t most) {
    return first >= 0 && length >= 1 && first <= most && length <= most - first;
  };
  TORCH_CHECK_VALUE(
      inside(view.left, view.width, width) && inside(view.top, view.height, height), "box[", i, "]: left ", view.left,
      ", top ", view.top, ", ", view.width, " x ", view.height, " px is not inside of an image of ", width, " x ",
      height);
  for (const double factor : view.factors) {
    TORCH_CHECK_VALUE(std::isfinite(factor), "factors[", i, "]: finite numbers are expected, found ", factor);
  }
  const double hue = view.factors[3];
  TORCH_CHECK_VALUE(std::abs(hue) <= 0.5, "factors[", i, "]: a hue from -0.5 to 0.5 is expected, found ", hue);
  auto sorted = view.order;
  std::sort(sorted.begin(), sorted.end());
  TORCH_CHECK_VALUE(
      sorted == (std::array<int64_t, 4>{0, 1, 2, 3}), "order[", i, "]: 0, 1, 2 and 3 are expected, found ",
      at::IntArrayRef(view.order));
  TORCH_CHECK_VALUE(
      view.sigma >= 0 && view.sigma <= dogo::kLargestSigma, "sigma[", i, "]: from 0 to ", dogo::kLargestSigma,
      " is expected, found ", view.sigma);
}

void check_out(const at::Tensor& out, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(
      out.device().is_cpu() && out.scalar_type() == at::kFloat && out.layout() == at::kStrided && out.sizes() == shape
          && out.is_contiguous(at::MemoryFormat::ChannelsLast),
      "out: a float32 CPU tensor of ", shape, " with channels_last strides is expected, found ", out.scalar_type(),
      out.sizes(), " with strides ", out.strides(), " on ", out.device());
}

at::Tensor augment_views(
    const std::vector<py::array>& arrays, const Rows<int64_t>& source, const Rows<int64_t>& box, const Rows<bool>& flip,
    const Rows<bool>& jitter, const Rows<double>& factors, const Rows<int64_t>& order, const Rows<bool>& grayscale,
    const Rows<double>& sigma, const Rows<bool>& solarize, int64_t size, const std::array<double, 3>& mean,
    const std::array<double, 3>& std, const std::optional<at::Tensor>& given) {
  const auto images = source_images(arrays);
  std::vector<dogo::View> views(source.size());
  for (int64_t i = 0; i < source.size(); ++i) {
    dogo::View& view = views[i];
    view = {source.at(i), box.at(i, 0),    box.at(i, 1),   box.at(i, 2), box.at(i, 3), flip.at(i),
            jitter.at(i), grayscale.at(i), solarize.at(i), {},           {},           sigma.at(i)};
    std::copy_n(factors.data(i), 4, view.factors.begin());
    std::copy_n(order.data(i), 4, view.order.begin());
    check_view(view, i, images);
  }
  for (int c = 0; c < 3; ++c) {
    TORCH_CHECK_VALUE(std::isfinite(mean[c]), "mean: finite numbers are expected, found ", mean[c]);
    TORCH_CHECK_VALUE(std::isfinite(std[c]) && std[c] > 0, "std: numbers > 0 are expected, found ", std[c]);
  }
  const std::array<int64_t, 4> shape{source.size(), 3, size, size};
  if (given) check_out(*given, shape);
  py::gil_scoped_release release;
  const auto options = at::TensorOptions(at::kFloat).memory_format(at::MemoryFormat::ChannelsLast);
  const at::Tensor out = given ? *given : at::empty(shape, options);
  dogo::augment_views(images, views, {mean, std}, out);
  out.unsafeGetTensorImpl()->bump_version();  // for autograd, as every change in place is
  return out;
}

py::array_t<double> philox_uniforms(
    const std::array<uint64_t, 2>& key, const Rows<int64_t>& counters, uint64_t stream, int64_t count) {
  TORCH_CHECK_VALUE(counters.ndim() == 1, "counters: [n] is expected, found ", counters.ndim(), " axes");
  TORCH_CHECK_VALUE(count >= 0, "count: 0 or more is expected, found ", count);
  py::array_t<double> out({counters.size(), static_cast<py::ssize_t>(count)});
  const int64_t* first = counters.data();
  double* numbers = out.mutable_data();
  const int64_t n = counters.size();
  py::gil_scoped_release release;
  dogo::philox_uniforms(key, stream, first, n, count, numbers);
  return out;
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
  m.def(
      "augment_views", &augment_views, py::arg("images"), py::kw_only(), py::arg("source"), py::arg("box"),
      py::arg("flip"), py::arg("jitter"), py::arg("factors"), py::arg("order"), py::arg("grayscale"), py::arg("sigma"),
      py::arg("solarize"), py::arg("size"), py::arg("mean"), py::arg("std"), py::arg("out"));
  m.def(
      "philox_uniforms", &philox_uniforms, py::arg("key"), py::arg("counters"), py::kw_only(), py::arg("stream"),
      py::arg("count"));
}
