// cuBLAS, cuDNN, cuSOLVER and NCCL where a caller reads what they return; the other functions are generated stubs.
//
// The signatures are those of the C interfaces, with enumerations as int. Matrix products are counted, not computed; all
// processes of a communicator are taken to hold the same, so that a collective needs nobody else.
#include <cstring>

#include "notes.h"

namespace {

int product(const char* name) {
  noted_call(std::string("product ") + name);
  return 0;
}

template <typename Handle>
int made(Handle* handle) {
  *handle = reinterpret_cast<Handle>(next_handle());
  return 0;
}

struct Communicator {
  int ranks, rank;
};

// ncclDataType_t: int8, uint8, int32, uint32, int64, uint64, float16, float32, float64, bfloat16, float8 (two kinds)
const size_t ITEM_BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

size_t collective(const char* name, size_t items, int type) {
  size_t bytes = items * ITEM_BYTES[type];
  noted_call(std::string("collective ") + name);
  note(std::string("bytes of collective ") + name, bytes);
  return bytes;
}

int joined(void** communicator, int ranks, int rank) {
  *communicator = new Communicator{ranks, rank};
  return 0;
}

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) { return made(handle); }
int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
int cublasGemmEx() { return product("gemm"); }
int cublasSgemm_v2() { return product("gemm"); }
int cublasDgemm_v2() { return product("gemm"); }
int cublasGemmStridedBatchedEx() { return product("batched gemm"); }
int cublasSgemmStridedBatched() { return product("batched gemm"); }
int cublasDgemmStridedBatched() { return product("batched gemm"); }
size_t cublasLtGetVersion() { return 120804; }
int cublasLtMatmulDescCreate(void** description, int, int) { return made(description); }
int cublasLtMatmulPreferenceCreate(void** preference) { return made(preference); }
int cublasLtMatrixLayoutCreate(void** layout, int, unsigned long, unsigned long, long) { return made(layout); }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* found) {
  memset(results, 0, 96);  // one cublasLtMatmulHeuristicResult_t: status 0, no workspace
  *found = 1;
  return 0;
}
int cublasLtMatmul() { return product("gemm with epilogue"); }

size_t cudnnGetVersion() { return 91002; }
size_t cudnnGetCudartVersion() { return 12080; }
int cudnnGetProperty(int which, int* value) { *value = which == 0 ? 9 : which == 1 ? 10 : 2; return 0; }
const char* cudnnGetErrorString(int) { return "error of the fake cuDNN"; }
int cudnnCreate(void** handle) { return made(handle); }

int cusolverDnCreate(void** handle) { return made(handle); }
int cusolverDnCreateParams(void** parameters) { return made(parameters); }
int cusolverDnCreateSyevjInfo(void** information) { return made(information); }
int cusolverDnCreateGesvdjInfo(void** information) { return made(information); }
// Eigenvalues need no workspace here.
int cusolverDnXsyevd_bufferSize(
    void*, void*, int, int, long, int, const void*, long, int, const void*, int, size_t* device, size_t* host) {
  *device = *host = 0;
  return 0;
}
int cusolverDnXsyevBatched_bufferSize(
    void*, void*, int, int, long, int, const void*, long, int, const void*, int, size_t* device, size_t* host, long) {
  *device = *host = 0;
  return 0;
}
#define NO_WORKSPACE(NAME) \
  int NAME(void*, int, int, int, const void*, int, const void*, int* size) { *size = 0; return 0; }
NO_WORKSPACE(cusolverDnSsyevd_bufferSize)
NO_WORKSPACE(cusolverDnDsyevd_bufferSize)
NO_WORKSPACE(cusolverDnSsyevj_bufferSize)
NO_WORKSPACE(cusolverDnDsyevj_bufferSize)

struct ncclUniqueId {
  char bytes[128];
};
int ncclGetVersion(int* version) { *version = 22703; return 0; }
int ncclGetUniqueId(ncclUniqueId* id) { memset(id, 7, sizeof *id); return 0; }
int ncclCommInitRank(void** communicator, int ranks, ncclUniqueId, int rank) {
  return joined(communicator, ranks, rank);
}
int ncclCommInitRankConfig(void** communicator, int ranks, ncclUniqueId, int rank, void*) {
  return joined(communicator, ranks, rank);
}
int ncclCommInitRankScalable(void** communicator, int ranks, int rank, int, ncclUniqueId*, void*) {
  return joined(communicator, ranks, rank);
}
int ncclCommSplit(Communicator* whole, int, int key, void** communicator, void*) {
  return joined(communicator, whole->ranks, key);
}
int ncclCommGetAsyncError(void*, int* error) { *error = 0; return 0; }
int ncclCommCount(Communicator* communicator, int* ranks) { *ranks = communicator->ranks; return 0; }
const char* ncclGetErrorString(int) { return "error of the fake NCCL"; }
const char* ncclGetLastError(void*) { return "error of the fake NCCL"; }
int ncclAllReduce(const void* from, void* to, size_t items, int type, int, void*, void*) {
  copy_small(to, from, collective("all-reduce", items, type));
  return 0;
}
int ncclAllGather(const void* from, void* to, size_t items, int type, Communicator* communicator, void*) {
  size_t bytes = collective("all-gather", items, type);
  for (int rank = 0; rank < communicator->ranks; rank++) copy_small(static_cast<char*>(to) + rank * bytes, from, bytes);
  return 0;
}
int ncclReduceScatter(
    const void* from, void* to, size_t items, int type, int, Communicator* communicator, void*) {
  size_t bytes = collective("reduce-scatter", items, type);
  copy_small(to, static_cast<const char*>(from) + communicator->rank * bytes, bytes);
  return 0;
}
int ncclBroadcast(const void* from, void* to, size_t items, int type, int, void*, void*) {
  copy_small(to, from, collective("broadcast", items, type));
  return 0;
}
int ncclReduce(const void* from, void* to, size_t items, int type, int, int, void*, void*) {
  copy_small(to, from, collective("reduce", items, type));
  return 0;
}
}
