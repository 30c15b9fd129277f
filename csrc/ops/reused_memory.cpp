#include "ops/reused_memory.h"

#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace flash_xlstm {
namespace {

constexpr size_t huge_page = size_t{1} << 21, least_bytes = size_t{4} << 20, most_held = size_t{256} << 20;

struct Array {
  void* data;
  size_t bytes;
};

class Held {
 public:
  // An array of exactly so many bytes.
  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      for (auto array = arrays_.begin(); array != arrays_.end(); ++array) {
        if (array->bytes != bytes) continue;
        void* data = array->data;
        arrays_.erase(array);
        total_ -= bytes;
        return data;
      }
    }
    void* data = std::aligned_alloc(huge_page, bytes);
    if (data == nullptr) throw std::bad_alloc();
#ifdef __linux__
    madvise(data, bytes, MADV_HUGEPAGE);  // may be refused
#endif
    return data;
  }

  // Frees the oldest ones beyond the limit.
  void give(Array array) {
    const std::lock_guard<std::mutex> guard(mutex_);
    arrays_.push_back(array);
    total_ += array.bytes;
    while (total_ > most_held) {
      std::free(arrays_.front().data);
      total_ -= arrays_.front().bytes;
      arrays_.pop_front();
    }
  }

 private:
  std::mutex mutex_;
  std::deque<Array> arrays_;
  size_t total_ = 0;
};

// Never destroyed: tensors may outlive the module.
Held& held() {
  static Held* const all = new Held;
  return *all;
}

}  // namespace

Tensor reused_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  size_t bytes = element_bytes(to_dtype(dtype));
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (!like.is_cpu() || bytes < least_bytes) return new_empty(like, sizes, dtype);
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1;
  for (size_t d = sizes.size(); d-- > 0; elements *= sizes[d]) strides[d] = elements;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  bytes = (bytes + huge_page - 1) / huge_page * huge_page;
  void* data = held().take(bytes);
  return torch::stable::from_blob(data, sizes, strides, cpu, dtype,
                                  [bytes](void* freed) { held().give({freed, bytes}); });
}

}  // namespace flash_xlstm
