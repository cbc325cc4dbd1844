// A CUDA runtime without a GPU: device memory is reserved host memory, launches are counted and compute nothing.
//
// PyTorch's own CUDA code runs unmodified above it: argument and device checks, streams, the caching allocator. The
// library is preloaded, so that its symbols come before those of libcudart.
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "notes.h"

namespace {

enum Kind { PAGEABLE, PINNED, DEVICE };
const char* const KIND_NAMES[] = {"pageable", "pinned", "device"};

struct Block {
  size_t size;
  Kind kind;
  int device;
};

// Allocated and never freed: other libraries call in while the process ends.
struct State {
  std::recursive_mutex mutex;
  std::map<std::string, long> counts;
  std::unordered_map<const void*, std::string> kernels;  // by the address of the host's stub
  std::map<uintptr_t, Block> blocks;
  size_t used = 0;  // bytes on the device
};
State& state() {
  static auto* all = new State;
  return *all;
}
using Guard = std::lock_guard<std::recursive_mutex>;

thread_local int current = 0;
// A bit for each device that anything was done on: ever, which makes its context, and since the last reset.
std::atomic<unsigned> contexts{0}, touched{0};
std::atomic<size_t> handles{0x1000};
// (what, bytes, where a copy arrived or null): the host has waited, or reads what the device should have computed.
void (*on_wait)(const char*, long, void*) = nullptr;

int num_devices() {
  const char* given = getenv("FAKE_CUDA_DEVICES");
  return given ? atoi(given) : 1;
}
size_t capacity() {
  const char* given = getenv("FAKE_CUDA_GIB");
  return static_cast<size_t>((given ? atof(given) : 140.0) * (1 << 30));
}

void waited(const char* what) {
  noted_call(what);
  if (on_wait) on_wait(what, 0, nullptr);
}

void* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

void add_block(const void* memory, size_t bytes, Kind kind) {
  Guard guard(state().mutex);
  state().blocks[reinterpret_cast<uintptr_t>(memory)] = {bytes, kind, current};
  if (kind == DEVICE) state().used += bytes;
}

size_t drop_block(const void* memory) {  // returns its bytes; 0: no such block
  Guard guard(state().mutex);
  auto found = state().blocks.find(reinterpret_cast<uintptr_t>(memory));
  if (found == state().blocks.end()) return 0;
  Block block = found->second;
  if (block.kind == DEVICE) state().used -= block.size;
  state().blocks.erase(found);
  return block.size;
}

void* take(size_t bytes, Kind kind) {
  bytes = (bytes + 511) / 512 * 512 + (bytes == 0) * 512;
  void* memory = reserve(bytes);
  if (memory) add_block(memory, bytes, kind);
  return memory;
}

void give_back(void* memory) {
  if (size_t bytes = drop_block(memory)) munmap(memory, bytes);
}

Block block_of(const void* memory) {
  Guard guard(state().mutex);
  auto address = reinterpret_cast<uintptr_t>(memory);
  auto after = state().blocks.upper_bound(address);
  if (after == state().blocks.begin()) return {0, PAGEABLE, 0};
  --after;
  return address < after->first + after->second.size ? after->second : Block{0, PAGEABLE, 0};
}

cudaError_t copied(void* to, const void* from, size_t bytes) {
  Kind source = block_of(from).kind, target = block_of(to).kind;
  std::string what = std::string("copy ") + KIND_NAMES[source] + " to " + KIND_NAMES[target];
  bool large = bytes > SMALL;
  noted_call(what + (large ? " large" : ""));
  note("bytes of " + what, bytes);
  bool read = source == DEVICE && target != DEVICE;
  if (read && bytes > SMALL) memset(to, 0, bytes);  // a kernel should have computed it: not what lay there before
  copy_small(to, from, bytes);
  bool pageable = (source == PAGEABLE && large) || target == PAGEABLE;
  if (on_wait && source != target && pageable) on_wait(what.c_str(), bytes, nullptr);
  if (on_wait && read) on_wait("read", bytes, to);
  return cudaSuccess;
}

cudaError_t filled(void* memory, int value, size_t bytes) {
  noted_call("memset");
  if (bytes <= SMALL) memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t launched(const void* kernel) {
  Guard guard(state().mutex);
  auto found = state().kernels.find(kernel);
  noted_call("kernel " + (found == state().kernels.end() ? "?" : found->second));
  return cudaSuccess;
}

template <typename Handle>
cudaError_t made(Handle* handle) {
  *handle = reinterpret_cast<Handle>(next_handle());
  return cudaSuccess;
}

}  // namespace

void note(const std::string& what, long count) {
  Guard guard(state().mutex);
  state().counts[what] += count;
}
void noted_call(const std::string& what, long count) {
  contexts |= 1u << current;
  touched |= 1u << current;
  note(what, count);
}
size_t next_handle() { return handles += 16; }
void copy_small(void* to, const void* from, size_t bytes) {
  if (to != from && bytes <= SMALL) memmove(to, from, bytes);
}

extern "C" {

// ---------------------------------------------------------------- for the tests
void fake_cuda_on_wait(void (*hook)(const char*, long, void*)) { on_wait = hook; }
unsigned fake_cuda_devices() { return touched; }
void fake_cuda_reset() {
  Guard guard(state().mutex);
  state().counts.clear();
  touched = 0;
}
int fake_cuda_write(const char* path) {  // lines "count <tab> name"
  Guard guard(state().mutex);
  FILE* file = fopen(path, "w");
  for (auto& [name, count] : state().counts) {
    std::string shown = name;
    if (name.rfind("kernel _Z", 0) == 0) {
      int status = 0;
      char* plain = abi::__cxa_demangle(name.c_str() + 7, nullptr, nullptr, &status);
      if (plain) shown = std::string("kernel ") + plain;
      free(plain);
    }
    fprintf(file, "%ld\t%s\n", count, shown.c_str());
  }
  return fclose(file);
}

// ---------------------------------------------------------------- devices
cudaError_t cudaGetDeviceCount(int* count) { *count = num_devices(); return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= num_devices()) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200 (fake)");
  p->uuid.bytes[0] = static_cast<char>(device + 1);
  p->totalGlobalMem = capacity();
  p->major = 9;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->l2CacheSize = 50 << 20;
  p->textureAlignment = 512;
  p->unifiedAddressing = p->managedMemory = p->concurrentKernels = 1;
  for (int axis = 0; axis < 3; axis++) {
    p->maxThreadsDim[axis] = 1024;
    p->maxGridSize[axis] = axis ? 65535 : 2147483647;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 1; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "error of the fake CUDA runtime"; }
const char* cudaGetErrorName(cudaError_t) { return "fakeCudaError"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

// ---------------------------------------------------------------- streams and events: everything has happened
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return made(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return made(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return made(stream); }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return made(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return made(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { waited("event"); return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { waited("stream"); return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { waited("device"); return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
#define EDGES , const cudaGraphEdgeData**
#else
#define EDGES
#endif
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
    const cudaGraphNode_t** EDGES, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}

// ---------------------------------------------------------------- memory
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  noted_call("malloc");
  {
    Guard guard(state().mutex);
    if (state().used + bytes > capacity()) return cudaErrorMemoryAllocation;
  }
  *memory = take(bytes, DEVICE);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFree(void* memory) { give_back(memory); return cudaSuccess; }
cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return cudaFree(memory); }
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  noted_call("pinned allocation");
  *memory = take(bytes, PINNED);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) { give_back(memory); return cudaSuccess; }
cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
  add_block(memory, bytes, PINNED);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* memory) { drop_block(memory); return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  Guard guard(state().mutex);
  *total = capacity();
  *free_bytes = *total - state().used;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  Block block = block_of(memory);
  const cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
  memset(attributes, 0, sizeof *attributes);
  attributes->device = block.device;
  attributes->type = types[block.kind];
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  waited("copy");
  return copied(to, from, bytes);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copied(to, from, bytes);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) {
  return copied(to, from, bytes);
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) { return filled(memory, value, bytes); }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return filled(memory, value, bytes);
}
cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static char symbols[1 << 20];
  *address = symbols;
  return cudaSuccess;
}

// ---------------------------------------------------------------- kernels
struct Launch {
  dim3 grid, block;
  size_t shared;
  CUstream_st* stream;
};
static thread_local std::vector<Launch>* launches = nullptr;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  if (!launches) launches = new std::vector<Launch>;
  launches->push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Launch launch = launches->back();
  launches->pop_back();
  *grid = launch.grid;
  *block = launch.block;
  *shared = launch.shared;
  *static_cast<CUstream_st**>(stream) = launch.stream;
  return cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) {
  static void* handle[2];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  Guard guard(state().mutex);
  state().kernels[host] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launched(kernel);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launched(kernel);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) { return launched(kernel); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

// ---------------------------------------------------------------- the driver, which PyTorch asks the runtime for
static int nothing() { return 0; }
static cudaError_t entry(const char* name, void** function, cudaDriverEntryPointQueryResult* result) {
  void* found = dlsym(RTLD_DEFAULT, name);
  std::string second = std::string(name) + "_v2";
  if (void* newer = dlsym(RTLD_DEFAULT, second.c_str())) found = newer;
  *function = found ? found : reinterpret_cast<void*>(nothing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(
    const char* name, void** function, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  return entry(name, function, result);
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  return entry(name, function, result);
}
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { *version = CUDART_VERSION; return 0; }
int cuDeviceGetCount(int* count) { *count = num_devices(); return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);
}
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = contexts >> device & 1;
  return 0;
}
int cuCtxGetCurrent(void** context) { *context = reinterpret_cast<void*>(1); return 0; }
int cuGetErrorString(int, const char** text) { *text = "error of the fake CUDA driver"; return 0; }
int cuPointerGetAttribute(void* value, int, unsigned long long) { memset(value, 0, sizeof(int)); return 0; }
// Kernels that NVRTC compiled: a function's handle is its name.
int cuModuleLoadData(void** module, const void*) { *module = reinterpret_cast<void*>(next_handle()); return 0; }
int cuModuleLoadDataEx(void** module, const void* image, unsigned, void*, void*) {
  return cuModuleLoadData(module, image);
}
int cuModuleGetFunction(void** function, void*, const char* name) { *function = strdup(name); return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) { *blocks = 2; return 0; }
int cuLaunchKernel(
    void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
  noted_call(std::string("kernel ") + static_cast<const char*>(function));
  return 0;
}
// Segments that grow: addresses are reserved first, memory is put under them in pieces.
struct Piece {
  size_t bytes;
  int device;
};
int cuMemAddressReserve(uintptr_t* address, size_t bytes, size_t, uintptr_t, unsigned long long) {
  *address = reinterpret_cast<uintptr_t>(reserve(bytes));
  return *address ? 0 : cudaErrorMemoryAllocation;
}
int cuMemAddressFree(uintptr_t address, size_t bytes) { return munmap(reinterpret_cast<void*>(address), bytes); }
int cuMemCreate(Piece** piece, size_t bytes, const int* properties, unsigned long long) {
  int device = properties[3];  // of CUmemAllocationProp location.id: whatever the calling thread's device is
  touched |= 1u << device;
  note("malloc");
  Guard guard(state().mutex);
  if (state().used + bytes > capacity()) return cudaErrorMemoryAllocation;
  *piece = new Piece{bytes, device};
  return 0;
}
int cuMemRelease(Piece* piece) { delete piece; return 0; }
int cuMemMap(uintptr_t address, size_t, size_t, Piece* piece, unsigned long long) {
  int mine = std::exchange(current, piece->device);
  add_block(reinterpret_cast<void*>(address), piece->bytes, DEVICE);
  current = mine;
  return 0;
}
int cuMemUnmap(uintptr_t address, size_t bytes) {
  for (uintptr_t start = address; start < address + bytes;) {
    size_t dropped = drop_block(reinterpret_cast<void*>(start));
    if (!dropped) return 1;
    start += dropped;
  }
  return 0;
}
}
