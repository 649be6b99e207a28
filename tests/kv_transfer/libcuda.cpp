// Stands for libcuda where there is none: the functions that libcuda.py binds, on host memory.
//
// Signatures are those of cuda.h. A copy moves its bytes when its event or stream is waited for. A
// thread without a context, a stream that ends too early and a handle that is not one are refused.

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace {

struct Copy { uint64_t to, from; size_t bytes; };
struct Stream { std::vector<Copy> waiting; };
struct Event { Stream* stream; size_t count; };
struct Handle { unsigned char bytes[64]; };
struct Uuid { unsigned char bytes[16]; };

enum { kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201, kInvalidHandle = 400 };
constexpr uint64_t kMagic = 0xba70c0da;
int context;
thread_local void* current = nullptr;
std::mutex lock;
std::map<uint64_t, size_t> allocations;
std::map<uint64_t, int> opened;
int streams = 0, events = 0;

void run(Stream* stream, size_t count) {
  std::lock_guard<std::mutex> held(lock);
  for (size_t i = 0; i < count && i < stream->waiting.size(); ++i) {
    Copy& copy = stream->waiting[i];
    std::memcpy(reinterpret_cast<void*>(copy.to), reinterpret_cast<void*>(copy.from), copy.bytes);
    copy.bytes = 0;
  }
}

}  // namespace

#define IN_CONTEXT if (current != &context) return kInvalidContext

extern "C" {

// For the tests: memory that is the device's, and how much is not given back.
void fake_allocated(uint64_t address, size_t bytes) { allocations[address] = bytes; }
int fake_left() { return streams + events + static_cast<int>(opened.size()); }

int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* device, int index) { *device = index + 7; return index ? kInvalidDevice : 0; }
int cuDeviceGetUuid_v2(Uuid* uuid, int device) {
  std::memset(uuid, device, sizeof *uuid);
  return 0;
}
int cuDevicePrimaryCtxRetain(void** made, int device) {
  *made = &context;
  return device == 7 ? 0 : kInvalidDevice;
}
int cuCtxSetCurrent(void* made) { current = made; return 0; }

int cuMemGetAddressRange_v2(uint64_t* base, size_t* bytes, uint64_t address) {
  IN_CONTEXT;
  for (auto [begin, size] : allocations) {
    if (address < begin || address >= begin + size) continue;
    if (base) *base = begin;
    if (bytes) *bytes = size;
    return 0;
  }
  return kInvalidValue;
}
int cuIpcGetMemHandle(Handle* handle, uint64_t address) {
  IN_CONTEXT;
  const uint64_t words[2] = {kMagic, address};
  std::memcpy(handle->bytes + 48, words, sizeof words);  // the far end, lest half of it travels
  return allocations.count(address) ? 0 : kInvalidValue;
}
int cuIpcOpenMemHandle_v2(uint64_t* address, Handle handle, unsigned flags) {
  IN_CONTEXT;
  uint64_t words[2];
  std::memcpy(words, handle.bytes + 48, sizeof words);
  if (words[0] != kMagic || flags != 1) return kInvalidHandle;
  ++opened[*address = words[1]];
  return 0;
}
int cuIpcCloseMemHandle(uint64_t address) {
  IN_CONTEXT;
  if (!opened.count(address)) return kInvalidValue;
  if (!--opened[address]) opened.erase(address);
  return 0;
}

int cuStreamCreate(Stream** stream, unsigned flags) {
  IN_CONTEXT;
  ++streams;
  *stream = new Stream;
  return flags == 1 ? 0 : kInvalidValue;
}
int cuStreamSynchronize(Stream* stream) {
  IN_CONTEXT;
  run(stream, SIZE_MAX);
  return 0;
}
int cuStreamDestroy_v2(Stream* stream) {
  IN_CONTEXT;
  for (const Copy& copy : stream->waiting) if (copy.bytes) return kInvalidHandle;
  --streams;
  delete stream;
  return 0;
}
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
  IN_CONTEXT;
  stream->waiting.push_back({to, from, bytes});
  return 0;
}

int cuEventCreate(Event** event, unsigned flags) {
  IN_CONTEXT;
  ++events;
  *event = new Event{};
  return flags == 3 ? 0 : kInvalidValue;
}
int cuEventRecord(Event* event, Stream* stream) {
  IN_CONTEXT;
  *event = {stream, stream->waiting.size()};
  return 0;
}
int cuEventSynchronize(Event* event) {
  IN_CONTEXT;
  run(event->stream, event->count);
  return 0;
}
int cuEventDestroy_v2(Event* event) {
  IN_CONTEXT;
  --events;
  delete event;
  return 0;
}
int cuGetErrorName(int code, const char** name) {
  *name = code == kInvalidHandle ? "CUDA_ERROR_INVALID_HANDLE" : nullptr;
  return 0;
}

}  // extern "C"
