#include "blocks.h"

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace vlcore::cuda {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

enum class Waits { no, for_warp, for_block, for_cluster, for_ever };
constexpr Waits kEnded = Waits::for_ever;

// The blocks of a cluster, each on an OS thread of its own.
struct Cluster {
  explicit Cluster(int size) : shared(size) {}

  // Waits for all blocks, which have to have come for the same; false where one has failed.
  bool meet(Waits what) {
    std::unique_lock lock(mutex);
    const int turn = turns;
    if (arrived == 0) purpose = what;
    if (purpose != what) return false;
    if (++arrived == static_cast<int>(shared.size())) {
      arrived = 0, ++turns;
      changed.notify_all();
    }
    changed.wait(lock, [&] { return failure || turns != turn; });
    return !failure;
  }

  void fail(std::exception_ptr error) {
    const std::lock_guard lock(mutex);
    if (!failure) failure = error;
    changed.notify_all();
  }

  // Where each block has its shared memory.
  std::vector<char*> shared;
  std::exception_ptr failure;

 private:
  std::mutex mutex;
  std::condition_variable changed;
  int arrived = 0, turns = 0;
  Waits purpose = Waits::no;
};

// A thread of a block: a stack, on which it goes on where it has waited.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t beginning;
  jmp_buf place;
  bool begun = false;
  Waits waits = Waits::no;
};

struct Warp {
  // What was given at this meeting of its lanes, and at the last, which some may still have to read.
  alignas(16) char given[2][kWarp * kMaxGiven];
  size_t bytes = 0;
  int meetings = 0, arrived = 0;
};

class Block;
thread_local Block* running;
// Any place in the memory that the OS threads each have of this library, which has all that is __shared__.
thread_local char anchor;

// That memory is filled with NaN, as what is left there by others could be.
int poison_memory_of(dl_phdr_info* library, size_t, void*) {
  char* const memory = static_cast<char*>(library->dlpi_tls_data);
  if (memory == nullptr) return 0;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& segment = library->dlpi_phdr[i];
    if (segment.p_type != PT_TLS || &anchor < memory || &anchor >= memory + segment.p_memsz) continue;
    std::memset(memory, 0xff, segment.p_memsz);
    return 1;
  }
  return 0;
}

void poison() {
  if (dl_iterate_phdr(poison_memory_of, nullptr) == 0) throw std::runtime_error("the shared memory is nowhere");
}

class Block {
 public:
  Block(int threads, const std::function<void()>& thread, Cluster& cluster, int rank)
      : cluster(cluster), rank(rank), thread(thread), fibers(threads), warps(threads / kWarp) {}

  void run(int index) {
    poison();
    running = this, this->index = index, blockIdx = {static_cast<unsigned>(index)};
    cluster.shared[rank] = &anchor;
    const int clusters_before = index / static_cast<int>(cluster.shared.size());
    backwards = (clusters_before + rank) % 2;
    for (auto& warp : warps) warp.meetings = warp.arrived = 0;
    for (auto& fiber : fibers) fiber.waits = Waits::no, fiber.begun = false;
    do {
      for (size_t i = 0; i < warps.size(); ++i) run_warp(backwards ? warps.size() - 1 - i : i);
    } while (pass_barrier());
    // What has ended has no memory left, whoever may still read it.
    poison();
    meet_others(kEnded);
  }

  // Of the running thread: lets others run until it need not wait.
  void wait(Waits what) {
    Fiber& fiber = fibers[now];
    fiber.waits = what;
    if (!_setjmp(fiber.place)) _longjmp(scheduler, 1);
  }

  const void* share(const void* mine, size_t bytes) {
    Warp& warp = warps[now / kWarp];
    char* const given = warp.given[warp.meetings % 2];
    // Two lanes that meet with different things in hand are not at the same place.
    if (warp.arrived > 0 && warp.bytes != bytes) wait(Waits::for_ever);
    warp.bytes = bytes;
    std::memcpy(given + now % kWarp * bytes, mine, bytes);
    if (++warp.arrived < kWarp) {
      wait(Waits::for_warp);
    } else {
      warp.arrived = 0, ++warp.meetings;
      const size_t first = now / kWarp * kWarp;
      for (size_t i = first; i < first + kWarp; ++i) fibers[i].waits = Waits::no;
    }
    return given;
  }

  int lane() const { return static_cast<int>(now % kWarp); }

  Cluster& cluster;
  const int rank;

 private:
  // Until its lanes have all ended or wait for more than each other.
  void run_warp(size_t warp) {
    for (bool any = true; any;) {
      any = false;
      for (size_t i = 0; i < kWarp; ++i) {
        const size_t fiber = warp * kWarp + (backwards ? kWarp - 1 - i : i);
        if (fibers[fiber].waits != Waits::no) continue;
        any = true;
        resume(fiber);
      }
    }
    for (size_t i = 0; i < kWarp; ++i) {
      if (fibers[warp * kWarp + i].waits == Waits::for_warp) throw error("a lane waits for others of its warp");
    }
  }

  // Past what all threads have come to, if that is not the end.
  bool pass_barrier() {
    const Waits what = fibers[0].waits;
    for (auto& fiber : fibers) {
      if (fiber.waits != what) throw error("some threads are at a barrier that others are not at");
      fiber.waits = Waits::no;
    }
    if (what == Waits::for_cluster) meet_others(what);
    return what != kEnded;
  }

  void meet_others(Waits what) {
    if (!cluster.meet(what)) throw error("blocks of its cluster wait for something else, or have failed");
  }

  void resume(size_t fiber) {
    now = fiber, threadIdx = {static_cast<unsigned>(fiber)};
    if (_setjmp(scheduler)) return;
    if (fibers[fiber].begun) _longjmp(fibers[fiber].place, 1);
    begin(fibers[fiber]);
  }

  void begin(Fiber& fiber) {
    fiber.begun = true;
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
    fiber.beginning.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.beginning, run_thread, 0);
    setcontext(&fiber.beginning);
  }

  static void run_thread() {
    running->thread();
    running->wait(kEnded);
  }

  std::runtime_error error(const char* what) const {
    return std::runtime_error("block " + std::to_string(index) + ": " + what);
  }

  const std::function<void()>& thread;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int index = 0;
  // The thread whose turn it is.
  size_t now = 0;
  jmp_buf scheduler;
  bool backwards = false;
};

}  // namespace

void run_blocks(int blocks, int cluster, int threads, const std::function<void()>& thread) {
  if (blocks <= 0 || cluster <= 0 || cluster > 8 || blocks % cluster || threads <= 0 || threads > 1024 ||
      threads % kWarp) {
    throw std::runtime_error("no GPU launches " + std::to_string(blocks) + " blocks in clusters of " +
                             std::to_string(cluster) + ", of " + std::to_string(threads) + " threads");
  }
  // As many clusters at once as keep the cores busy.
  const int clusters = blocks / cluster;
  const int teams = std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / cluster, 1, clusters);
  std::vector<std::unique_ptr<Cluster>> meetings;
  std::vector<std::thread> workers;
  for (int team = 0; team < teams; ++team) {
    Cluster& meeting = *meetings.emplace_back(std::make_unique<Cluster>(cluster));
    for (int rank = 0; rank < cluster; ++rank) {
      workers.emplace_back([&thread, &meeting, team, teams, clusters, cluster, threads, rank] {
        try {
          Block block(threads, thread, meeting, rank);
          for (int i = team; i < clusters; i += teams) {
            block.run(i * cluster + rank);
          }
        } catch (...) {
          meeting.fail(std::current_exception());
        }
      });
    }
  }
  for (auto& worker : workers) worker.join();
  for (auto& meeting : meetings) {
    if (meeting->failure) std::rethrow_exception(meeting->failure);
  }
}

void __syncthreads() { running->wait(Waits::for_block); }
void cluster_sync() { running->wait(Waits::for_cluster); }
int cluster_size() { return static_cast<int>(running->cluster.shared.size()); }
int cluster_rank() { return running->rank; }
int lane() { return running->lane(); }

const void* of_block(const void* place, int rank) {
  return running->cluster.shared[rank] + (static_cast<const char*>(place) - &anchor);
}

const void* of_all_lanes(const void* mine, size_t bytes) { return running->share(mine, bytes); }

}  // namespace vlcore::cuda
