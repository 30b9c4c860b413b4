// The threads behind parallel_for: started once, asleep between calls, since a product may take no longer than their start.
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "../common.h"

namespace qrealign {
namespace {

class Pool {
 public:
  Pool() : process_(getpid()) {}

  pid_t process() const { return process_; }

  void run(int parts, Part part, const void* body) {
    const std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
    int own_from = 1;  // parts from here on have no thread
    if (only) {
      const std::lock_guard<std::mutex> lock(mutex_);
      own_from = std::min(parts, start_threads(parts - 1) + 1);
      part_ = part;
      body_ = body;
      parts_ = own_from;
      unfinished_ = own_from - 1;
      ++call_;
    }
    called_.notify_all();
    part(body, 0);
    for (int i = own_from; i < parts; ++i) part(body, i);
    if (only) {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, [this] { return unfinished_ == 0; });
    }
  }

 private:
  // Returns how many threads there are: fewer than wanted where the system gives no more.
  int start_threads(int wanted) {
    try {
      for (; threads_ < wanted; ++threads_) std::thread(&Pool::work, this, threads_ + 1, call_).detach();
    } catch (const std::system_error&) {
    }
    return threads_;
  }

  void work(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      called_.wait(lock, [&] { return call_ != seen; });
      seen = call_;
      if (index >= parts_) continue;
      lock.unlock();
      part_(body_, index);
      lock.lock();
      if (--unfinished_ == 0) finished_.notify_one();
    }
  }

  const pid_t process_;
  std::mutex busy_;  // held while a call runs; a second caller computes alone
  std::mutex mutex_;
  std::condition_variable called_, finished_;
  int threads_ = 0, parts_ = 0, unfinished_ = 0;
  uint64_t call_ = 0;
  Part part_ = nullptr;
  const void* body_ = nullptr;
};

// Never destroyed: its threads may still wait when the process ends. A forked process has none of them and gets its own.
Pool& pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!current || current->process() != getpid()) current = new Pool;
  return *current;
}

}  // namespace

void run_parts(int parts, Part part, const void* body) { pool().run(parts, part, body); }

}  // namespace qrealign
