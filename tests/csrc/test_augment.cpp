// Views of images that end where their memory ends, for the sanitizers: sizes around every block and vector.
#include "augment.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#undef CHECK  // torch's
#include "check.h"

using namespace dogo;

namespace {

constexpr Statistics kBytes{{0, 0, 0}, {1 / 255.0, 1 / 255.0, 1 / 255.0}};  // pixels as they are
constexpr int64_t kSides[] = {1, 2, 7, 21, 32, 64, 65, 129, 300};

at::Tensor made(const SourceImage& image, const std::vector<View>& views, int64_t size) {
  const auto m = static_cast<int64_t>(views.size());
  const at::Tensor out = at::empty({m, size, size, 3}, at::kFloat).permute({0, 3, 1, 2});
  augment_views({image}, views, kBytes, out);
  return out;
}

// Everything but what would change an even grey: brightness halves it.
View changed(int64_t width, int64_t height, double sigma) {
  return {0, 0, 0, width, height, true, true, true, true, {0.5, 1.7, 0.3, 0.2}, {3, 1, 0, 2}, sigma};
}

}  // namespace

TEST(views_of_ragged_images) {
  for (const int64_t height : kSides) {
    for (const int64_t width : kSides) {
      const std::vector<uint8_t> grey(3 * height * width, 80);
      for (const int64_t size : {1, 5, 32, 33, 100}) {
        const auto views =
            made({grey.data(), height, width}, {changed(width, height, 1.7), changed(width, height, 90)}, size);
        const float* pixels = views.const_data_ptr<float>();
        CHECK(std::all_of(pixels, pixels + views.numel(), [](float v) { return v == 40; }));
      }
    }
  }
}

TEST(views_of_corners) {
  const int64_t height = 50, width = 70;
  std::vector<uint8_t> pixels(3 * height * width);
  for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<uint8_t>(i * 37 % 251);
  std::vector<View> views;
  for (int64_t side = 1; side <= height; ++side) {
    View view = changed(side, side, 0.9);
    view.left = width - side;
    view.top = height - side;
    views.push_back(view);
  }
  const int threads = at::get_num_threads();
  at::set_num_threads(3);
  const auto several = made({pixels.data(), height, width}, views, 24);
  at::set_num_threads(1);
  CHECK(several.equal(made({pixels.data(), height, width}, views, 24)));
  at::set_num_threads(threads);
}
