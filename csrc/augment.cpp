#include "augment.h"

#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>

#include "buffer.h"
#include "pixels.h"
#include "resample.h"

namespace dogo {
namespace {

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Asks for large pages: memory that is new costs 0.19 ms a view of 224 px to write, and 0.10 with them.
void want_large_pages([[maybe_unused]] float* data, [[maybe_unused]] int64_t numel) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + numel * sizeof(float)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

enum Operation : int64_t { kBrightness, kContrast, kSaturation, kHue };  // in the order of View::factors

// Makes views one after another; one a thread, as its memory is its own: 3 (32 (w + P) + P h) + 4 P^2 bytes and a
// little.
class ViewMaker {
 public:
  ViewMaker(int64_t size, const Statistics& statistics)
      : S_(size),
        P_(rounded_up(size, kPixelAlign)),
        plane_(P_ * P_),
        kernels_(pixel_kernels()),
        columns_(3 * kBand * P_),
        planes_(3 * plane_),
        transposed_(plane_),
        passes_(2 * kMostLanes * S_) {
    for (int c = 0; c < 3; ++c) {
      scale_[c] = static_cast<float>(1 / (255 * statistics.std[c]));
      shift_[c] = static_cast<float>(-statistics.mean[c] / statistics.std[c]);
    }
  }

  // out: [S][S][3]
  void make(const SourceImage& image, const View& view, float* out) {
    resize(image, view);
    if (view.jitter) {
      for (const int64_t operation : view.order) jitter(operation, view.factors[operation]);
    }
    if (view.grayscale) kernels_.saturate(planes_.data(), plane_, 0);
    if (view.sigma > 0) blur(box_of(view.sigma), view.grayscale);
    if (view.solarize) kernels_.solarize(planes_.data(), 3 * plane_);
    kernels_.normalize(planes_.data(), S_, P_, scale_, shift_, out);
  }

 private:
  // Along rows and then along columns, with bytes in between; the other way round where Pillow 13 does.
  void resize(const SourceImage& image, const View& view) {
    across_.set(view.width, S_);
    down_.set(view.height, S_);
    const uint8_t* corner = image.pixels + 3 * (view.top * image.width + view.left);
    const int64_t pitch = 3 * image.width, bytes = 3 * view.width;
    if (view.height > S_ && view.height - S_ > 2 * (view.width - S_)) {
      reserve(middle_, S_ * bytes);
      for (int64_t y = 0; y < S_; ++y) weigh(corner, pitch, down_[y], bytes, middle_.data() + y * bytes);
      narrow(middle_.data(), bytes, S_, view, planes_.data(), plane_);
      return;
    }
    const int64_t rows = rounded_up(view.height, kBand);
    reserve(middle_, 3 * rows * P_);
    narrow(corner, pitch, view.height, view, middle_.data(), rows * P_);
    for (int64_t c = 0; c < 3; ++c) {
      const uint8_t* from = middle_.data() + c * rows * P_;
      for (int64_t y = 0; y < S_; ++y) weigh(from, P_, down_[y], P_, planes_.data() + c * plane_ + y * P_);
    }
  }

  // Makes rows of the view's width of `height` rows of the crop's, and planes of pixels, band by band.
  void narrow(const uint8_t* rows, int64_t pitch, int64_t height, const View& view, uint8_t* planes, int64_t plane) {
    const int64_t bytes = 3 * view.width, step = 3 * kBand;
    reserve(band_, rounded_up(bytes, 64) * kBand);
    for (int64_t y = 0; y < height; y += kBand) {
      kernels_.band(rows + y * pitch, pitch, std::min(kBand, height - y), bytes, band_.data());
      for (int64_t x = 0; x < S_; ++x) {
        uint8_t* to = columns_.data() + (view.flip ? S_ - 1 - x : x) * step;
        weigh(band_.data(), step, across_[x], step, to);
      }
      kernels_.unband(columns_.data(), S_, planes + y * P_, P_, plane);
    }
  }

  void weigh(const uint8_t* rows, int64_t pitch, const Taps::Pixel& pixel, int64_t n, uint8_t* out) {
    kernels_.weigh(rows + pixel.first * pitch, pitch, pixel.weights, pixel.count, n, out);
  }

  void jitter(int64_t operation, double exact) {
    uint8_t* planes = planes_.data();
    // What differs by a level at least, differs by more than 255 times one of these: larger ones change nothing.
    const float factor = static_cast<float>(std::clamp(exact, -1e6, 1e6));
    if (operation == kBrightness) kernels_.blend(planes, 3 * plane_, 0, factor);
    if (operation == kContrast) {
      const double mean = static_cast<double>(kernels_.luminance(planes, S_, P_)) / static_cast<double>(S_ * S_);
      kernels_.blend(planes, 3 * plane_, static_cast<float>(static_cast<int>(mean + 0.5)), factor);
    }
    if (operation == kSaturation) kernels_.saturate(planes, plane_, factor);
    if (operation == kHue) kernels_.hue(planes, plane_, static_cast<int32_t>(exact * 255));
  }

  // Along rows, then along columns; of a grey view one plane stands for all.
  void blur(const Box& box, bool grey) {
    for (int64_t c = 0; c < 3; ++c) {
      uint8_t* plane = planes_.data() + c * plane_;
      if (grey && c > 0) {
        std::copy_n(planes_.data(), plane_, plane);
        continue;
      }
      for (int direction = 0; direction < 2; ++direction) {
        kernels_.transpose(plane, P_, transposed_.data());
        kernels_.blur(transposed_.data(), S_, P_, box, passes_.data(), plane);
      }
    }
  }

  static void reserve(Buffer<uint8_t>& buffer, int64_t size) {
    if (buffer.end() - buffer.begin() < size) buffer = Buffer<uint8_t>(size);
  }

  const int64_t S_, P_, plane_;
  const PixelKernels& kernels_;
  float scale_[3], shift_[3];
  Taps across_, down_;
  Buffer<uint8_t> band_, columns_, middle_, planes_, transposed_;
  Buffer<int32_t> passes_;
};

}  // namespace

void augment_views(
    const std::vector<SourceImage>& images, const std::vector<View>& views, const Statistics& statistics,
    const at::Tensor& out) {
  const auto m = static_cast<int64_t>(views.size()), size = out.size(2);
  float* pixels = out.data_ptr<float>();
  want_large_pages(pixels, out.numel());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), m), 1, [&](int64_t, int64_t) {
    ViewMaker maker(size, statistics);
    for (int64_t i = next++; i < m; i = next++) {
      maker.make(images[views[i].source], views[i], pixels + i * 3 * size * size);
    }
  });
}

}  // namespace dogo
