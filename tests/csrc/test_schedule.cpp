// The schedule: every pair once, in an order that threads can share, with the same sums for any number of threads.
#include <ATen/Parallel.h>

#include <set>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "schedule.h"

using namespace dogo;

TEST(every_pair_once) {
  for (int32_t blocks = 1; blocks <= 17; ++blocks) {
    std::set<std::pair<int32_t, int32_t>> seen;
    for (const auto& task : all_pairs(blocks)) {
      CHECK(0 <= task.I && task.I <= task.J && task.J < blocks);
      CHECK(seen.insert({task.I, task.J}).second);
    }
    CHECK(seen.size() == static_cast<size_t>(blocks * (blocks + 1) / 2));
  }
}

TEST(neighbours_share_no_block) {
  const int32_t blocks = 16;
  const auto tasks = all_pairs(blocks);
  // A round is blocks / 2 tasks, behind those of blocks with themselves.
  for (size_t start = blocks; start < tasks.size(); start += blocks / 2) {
    std::set<int32_t> round;
    for (size_t k = start; k < start + blocks / 2; ++k) {
      CHECK(round.insert(tasks[k].I).second);
      CHECK(round.insert(tasks[k].J).second);
    }
  }
}

TEST(turns_count_what_is_left) {
  const auto tasks = choose(all_pairs(6), 6, [](const Task& task) { return (task.I + task.J) % 3 == 0; });
  std::vector<int32_t> seen(6);
  for (const auto& task : tasks) {
    CHECK(task.turn_I == seen[task.I]++);
    if (task.I != task.J) CHECK(task.turn_J == seen[task.J]++);
  }
  CHECK(!tasks.empty());
}

TEST(blocks_cover_every_image_once) {
  for (int64_t n : {1, 15, 16, 17, 40}) {
    for (int64_t world : {1, 3}) {
      std::vector<int> seen(2 * n * world), own(2 * n * world);
      for (const auto& block : make_blocks(n, world, world - 1, 16)) {
        CHECK(block.images >= 1 && block.images <= 16);
        for (int64_t i = 0; i < block.images; ++i) {
          ++seen[block.view * n * world + block.first_image + i];
          own[block.view * n * world + block.first_image + i] += block.own;
        }
      }
      for (int64_t row = 0; row < 2 * n * world; ++row) {
        CHECK(seen[row] == 1);
        CHECK(own[row] == (row % (n * world) >= (world - 1) * n));
      }
    }
  }
}

// The order in which tasks reach each block, with `threads` threads.
static std::vector<std::vector<size_t>> order_of(const std::vector<Task>& tasks, int32_t blocks, int threads) {
  at::set_num_threads(threads);
  std::vector<std::vector<size_t>> order(blocks);
  run(tasks, blocks, [&](Turns& turns) {
    return [&](const Task& task) {
      const size_t k = &task - tasks.data();
      if (k % 5 == 0) std::this_thread::yield();
      turns.take(task.J, task.turn_J, [&] { order[task.J].push_back(k); });  // J first: any order must do
      if (task.I != task.J) turns.take(task.I, task.turn_I, [&] { order[task.I].push_back(k); });
    };
  });
  return order;
}

TEST(order_does_not_depend_on_threads) {
  const auto tasks = all_pairs(9);
  const auto alone = order_of(tasks, 9, 1);
  for (int repeat = 0; repeat < 200; ++repeat) CHECK(order_of(tasks, 9, 2 + repeat % 4) == alone);
  at::set_num_threads(2);
}

TEST(an_exception_ends_all_and_is_thrown) {
  const auto tasks = all_pairs(8);
  for (size_t bad : {size_t{0}, size_t{7}, tasks.size() - 1}) {
    for (int threads : {1, 2, 4}) {
      at::set_num_threads(threads);
      bool caught = false;
      try {
        run(tasks, 8, [&](Turns& turns) {
          return [&](const Task& task) {
            if (&task == &tasks[bad]) throw std::runtime_error("as planned");
            turns.take(task.I, task.turn_I, [] {});
            if (task.I != task.J) turns.take(task.J, task.turn_J, [] {});
          };
        });
      } catch (const std::runtime_error& error) {
        caught = std::string(error.what()) == "as planned";
      }
      CHECK(caught);
    }
  }
  at::set_num_threads(2);
}
