// Which tiles there are, and who adds what to a block of rows in which order.
//
// Legend
//   z      unit rows of both views of all ranks, M = 2N: view 1, then view 2
//   block  up to `side` consecutive images of one view and one rank
//   task   a pair of blocks (I, J), I <= J: the tile of similarities between their rows, which serves both
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace dogo {

struct Block {
  int view;             // 0 or 1
  int64_t first_image;  // among those of all ranks
  int64_t images;
  bool own;  // of this rank
};

struct Task {
  int32_t I, J;
  int32_t turn_I = 0, turn_J = 0;  // tasks before this one that have the block, too
};

// The blocks of both views of `world` ranks with n images each; those of `rank` are own.
std::vector<Block> make_blocks(int64_t n, int64_t world, int64_t rank, int64_t side);

// Every pair of blocks once, a block with itself included, in the order of a round-robin tournament: neighbours share
// no block, so that threads which take tasks in this order seldom wait for one another.
std::vector<Task> all_pairs(int32_t blocks);

// The tasks that `wanted` keeps, in the same order, with their turns.
std::vector<Task> choose(
    const std::vector<Task>& tasks, int32_t blocks, const std::function<bool(const Task&)>& wanted);

// The order in which tasks add to a block: that of the schedule.  So sums are equal bit by bit for any number of
// threads, and no two threads add to one block at once.
class Turns {
 public:
  explicit Turns(int32_t blocks) : done_(blocks) {}

  // Calls `add` when it is this task's turn for the block.  False where another task failed: its turn never comes.
  template <typename Add>
  bool take(int32_t block, int32_t turn, const Add& add) {
    for (int spins = 0; done_[block].load(std::memory_order_acquire) != turn; ++spins) {
      if (failed_.load(std::memory_order_relaxed)) return false;
      if (spins > 64) std::this_thread::yield();
    }
    add();
    done_[block].store(turn + 1, std::memory_order_release);
    return true;
  }

  void fail(std::exception_ptr error);
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  void rethrow() const;

 private:
  std::vector<std::atomic<int32_t>> done_;
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Runs the tasks on ATen's threads, in order as threads come free.  `make_worker(turns)` is called once a thread and
// returns what runs a task; that must take both turns of each, in whatever order.  An exception ends all and is thrown.
template <typename MakeWorker>
void run(const std::vector<Task>& tasks, int32_t blocks, const MakeWorker& make_worker) {
  Turns turns(blocks);
  std::atomic<size_t> next{0};
  // A task waits only for tasks before it, and those are done or running: whoever has the first unfinished one never
  // waits.
  const auto threads = std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(tasks.size()));
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      auto work = make_worker(turns);
      for (size_t k = next++; k < tasks.size() && !turns.failed(); k = next++) work(tasks[k]);
    } catch (...) {
      turns.fail(std::current_exception());
    }
  });
  turns.rethrow();
}

}  // namespace dogo
