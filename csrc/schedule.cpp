#include "schedule.h"

#include <algorithm>

namespace dogo {

std::vector<Block> make_blocks(int64_t n, int64_t world, int64_t rank, int64_t side) {
  std::vector<Block> blocks;
  for (int view = 0; view < 2; ++view) {
    for (int64_t r = 0; r < world; ++r) {
      for (int64_t i = 0; i < n; i += side) blocks.push_back({view, r * n + i, std::min(side, n - i), r == rank});
    }
  }
  return blocks;
}

std::vector<Task> all_pairs(int32_t blocks) {
  std::vector<Task> tasks;
  for (int32_t I = 0; I < blocks; ++I) tasks.push_back({I, I});
  // The circle method: one player stays, the others move on by one place a round; with an odd number, who meets the
  // player that does not exist has a round off.
  const int32_t players = blocks + blocks % 2;
  for (int32_t round = 0; round < players - 1; ++round) {
    const auto seat = [&](int32_t k) { return k == 0 ? players - 1 : (round + k) % (players - 1); };
    for (int32_t k = 0; k < players / 2; ++k) {
      const auto [I, J] = std::minmax({seat(k), seat(players - 1 - k)});
      if (J < blocks) tasks.push_back({I, J});
    }
  }
  return choose(tasks, blocks, [](const Task&) { return true; });
}

std::vector<Task> choose(
    const std::vector<Task>& tasks, int32_t blocks, const std::function<bool(const Task&)>& wanted) {
  std::vector<int32_t> seen(blocks);
  std::vector<Task> chosen;
  for (Task task : tasks) {
    if (!wanted(task)) continue;
    task.turn_I = seen[task.I]++;
    task.turn_J = task.I == task.J ? task.turn_I : seen[task.J]++;
    chosen.push_back(task);
  }
  return chosen;
}

void Turns::fail(std::exception_ptr error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!error_) error_ = error;
  failed_.store(true, std::memory_order_relaxed);
}

void Turns::rethrow() const {
  if (error_) std::rethrow_exception(error_);
}

}  // namespace dogo
