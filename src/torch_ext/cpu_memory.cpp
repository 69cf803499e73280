// Memory of tensors on the CPU: a region of address space of their own, cut by best fit, neighbours joined again when they are free.
//
// libtorch's own allocator takes aligned memory of malloc, and a run's memory then grows from step to step: whatever else is
// allocated in between and stays (compiled products of oneDNN, above all) keeps the holes around it from being joined, and one that
// looks for a hole larger by the alignment never puts a tensor where one of its size has been. Here nothing lies between tensors but
// tensors.
//
// Small ones have a region of slabs, each of blocks of one size: a step has thousands of them.
//
// Regions take addresses, not memory: a page is taken when it is first written, and kept for the next step.
#include "torch_ext.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory_resource>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>

namespace {

// What vector instructions like best, and what libtorch promises.
constexpr size_t ALIGNMENT = 64;
// Sizes are multiples of this: what is left over of a hole is worth keeping.
constexpr size_t GRAIN = 512;
// What is smaller lies in slabs.
constexpr size_t SMALL = 4096;
constexpr size_t SLAB = 64 << 10;
constexpr size_t SLABS = 16384;

size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Addresses without memory; null where the system refuses.
char* addresses(size_t bytes) {
  void* first = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return first == MAP_FAILED ? nullptr : static_cast<char*>(first);
}

// Blocks of fewer than SMALL bytes. A free one holds the address of the next of its size.
class Slabs {
 public:
  // Null where all slabs are in use.
  void* take(size_t bytes) {
    const size_t kind = rounded_up(bytes, ALIGNMENT) / ALIGNMENT;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_[kind] == nullptr && !cut(kind)) return nullptr;
    void* block = free_[kind];
    free_[kind] = *static_cast<void**>(block);
    return block;
  }

  void give(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    void*& next = free_[kinds_[(static_cast<char*>(block) - first_) / SLAB]];
    *static_cast<void**>(block) = next;
    next = block;
  }

  bool holds(const void* data) const {
    const auto* place = static_cast<const char*>(data);
    return first_ != nullptr && place >= first_ && place < first_ + SLABS * SLAB;
  }

 private:
  // Makes a slab into blocks.
  bool cut(size_t kind) {
    if (first_ == nullptr || slabs_ == SLABS) return false;
    char* slab = first_ + slabs_ * SLAB;
    kinds_[slabs_++] = static_cast<uint8_t>(kind);
    const size_t bytes = kind * ALIGNMENT;
    for (size_t at = SLAB / bytes; at-- > 0;) {
      *reinterpret_cast<void**>(slab + at * bytes) = free_[kind];
      free_[kind] = slab + at * bytes;
    }
    return true;
  }

  std::mutex mutex_;
  char* first_ = addresses(SLABS * SLAB);
  size_t slabs_ = 0;
  // Of a slab, its blocks' size in units of ALIGNMENT.
  std::array<uint8_t, SLABS> kinds_{};
  std::array<void*, SMALL / ALIGNMENT + 1> free_{};
};

class Region {
 public:
  explicit Region(size_t bytes) : size_(bytes), first_(addresses(bytes)) {
    if (first_ != nullptr) add(first_, size_);
  }

  // Null where no hole is large enough.
  void* take(size_t bytes) {
    bytes = rounded_up(bytes, GRAIN);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto hole = by_size_.lower_bound({bytes, nullptr});
    if (hole == by_size_.end()) return nullptr;
    const auto [size, place] = *hole;
    remove(place, size);
    if (size > bytes) add(place + bytes, size - bytes);
    taken_[place] = bytes;
    allocated += static_cast<int64_t>(bytes);
    peak = std::max(peak, allocated);
    used = std::max<int64_t>(used, place + bytes - first_);
    return place;
  }

  void give(void* data) {
    auto* place = static_cast<char*>(data);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto own = taken_.find(place);
    size_t size = own->second;
    taken_.erase(own);
    allocated -= static_cast<int64_t>(size);
    const auto after = holes_.lower_bound(place);
    if (after != holes_.begin()) {
      const auto [start, length] = *std::prev(after);
      if (start + length == place) {
        remove(start, length);
        place = start;
        size += length;
      }
    }
    const auto next = holes_.find(place + size);
    if (next != holes_.end()) {
      const size_t length = next->second;
      remove(place + size, length);
      size += length;
    }
    add(place, size);
  }

  bool holds(const void* data) const {
    const auto* place = static_cast<const char*>(data);
    return first_ != nullptr && place >= first_ && place < first_ + size_;
  }

  int64_t allocated = 0, peak = 0, used = 0;

 private:
  void add(char* place, size_t size) {
    holes_[place] = size;
    by_size_.insert({size, place});
  }

  void remove(char* place, size_t size) {
    holes_.erase(place);
    by_size_.erase({size, place});
  }

  std::mutex mutex_;
  size_t size_;
  char* first_;
  // Entries come and go with every tensor: their memory is kept, too.
  std::pmr::unsynchronized_pool_resource entries_;
  std::pmr::map<char*, size_t> holes_{&entries_};
  std::pmr::set<std::pair<size_t, char*>> by_size_{&entries_};
  std::pmr::unordered_map<char*, size_t> taken_{&entries_};
};

// Twice the memory of the machine, for holes; never destroyed, as tensors may outlive everything.
Region& region() {
  static Region& region = *new Region(2 * static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE));
  return region;
}

Slabs& slabs() {
  static Slabs& slabs = *new Slabs();
  return slabs;
}

void give_back(void* data) {
  if (slabs().holds(data)) {
    slabs().give(data);
  } else if (region().holds(data)) {
    region().give(data);
  } else {
    std::free(data);
  }
}

struct CpuAllocator final : public c10::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes > 0) {
      data = bytes < SMALL ? slabs().take(bytes) : region().take(bytes);
      if (data == nullptr) data = std::aligned_alloc(ALIGNMENT, rounded_up(bytes, ALIGNMENT));
      TORCH_CHECK(data != nullptr, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes.");
    }
    return {data, data, &give_back, c10::Device(c10::kCPU)};
  }

  at::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

extern "C" {

void engraft_allocate_on_cpu() {
  static CpuAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
}

// Of every shape that products have, and each micro-batch has its own, oneDNN keeps what it compiled, and so does the layer between it
// and libtorch, which is asked first: of 1024 shapes each unless told otherwise, and about 270 KB of each.
void engraft_keep_shapes(int count) {
  const std::string text = std::to_string(count);
  setenv("LRU_CACHE_CAPACITY", text.c_str(), /*overwrite=*/0);
  setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", text.c_str(), /*overwrite=*/0);
}

void engraft_cpu_memory(int64_t* allocated, int64_t* peak, int64_t* used) {
  *allocated = region().allocated;
  *peak = region().peak;
  *used = region().used;
}
}
