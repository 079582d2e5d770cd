// Stands in for ONNX Runtime's own header, which its wheel lacks: the library's interface is a table of functions whose
// places never change, and these are the ones that docs/integrate.md calls, at their places. Not for any other use.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>

struct OrtStatus;
struct OrtEnv;
struct OrtSessionOptions;
struct OrtSession;
struct OrtMemoryInfo;
struct OrtRunOptions;
struct OrtValue;

constexpr uint32_t ORT_API_VERSION = 1;
constexpr int ORT_LOGGING_LEVEL_WARNING = 2;
constexpr int OrtArenaAllocator = 1;
constexpr int OrtMemTypeDefault = 0;
constexpr int ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1;

struct OrtApi {
  void *unused_0_1[2];
  const char *(*GetErrorMessage)(const OrtStatus *);                                          // 2
  OrtStatus *(*CreateEnv)(int level, const char *name, OrtEnv **);                            // 3
  void *unused_4_6[3];
  OrtStatus *(*CreateSession)(const OrtEnv *, const char *path, const OrtSessionOptions *, OrtSession **);  // 7
  void *unused_8;
  OrtStatus *(*Run)(OrtSession *, const OrtRunOptions *, const char *const *input_names, const OrtValue *const *inputs,
                    size_t input_count, const char *const *output_names, size_t output_count, OrtValue **outputs);  // 9
  OrtStatus *(*CreateSessionOptions)(OrtSessionOptions **);                                   // 10
  void *unused_11_23[13];
  OrtStatus *(*SetIntraOpNumThreads)(OrtSessionOptions *, int);                               // 24
  void *unused_25_48[24];
  OrtStatus *(*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void *data, size_t bytes, const int64_t *shape,
                                               size_t dimensions, int type, OrtValue **);     // 49
  void *unused_50;
  OrtStatus *(*GetTensorMutableData)(OrtValue *, void **);                                    // 51
  void *unused_52_68[17];
  OrtStatus *(*CreateCpuMemoryInfo)(int allocator, int type, OrtMemoryInfo **);               // 69
};

struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)();
};

extern "C" const OrtApiBase *OrtGetApiBase();
