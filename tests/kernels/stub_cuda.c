/* A stub of libcuda.so.1 without a device, with the functions that Triton's driver and launcher need (triton 3.6 to
 * 3.9).
 *
 * A launch is recorded, not run; stub_driver.py reads the record.
 */

#include "cuda.h"
#include <stdlib.h>
#include <string.h>

#define MOST_PARAMETERS 128
#define MOST_BYTES 8 /* the largest parameter: a pointer or an int64 */

/* The last launch. stub_driver.py sets the sizes of the kernel's parameters before it; a real driver reads them from
 * the cubin. */
struct {
  int launches;
  int count;
  int sizes[MOST_PARAMETERS];
  unsigned int grid[3], block[3], shared, attributes;
  void *stream;
  const char *kernel;
  unsigned char parameters[MOST_PARAMETERS][MOST_BYTES];
} stub_launch;

static char a_context, a_module;

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error from the stub in tests/kernels/stub_cuda.c";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) { /* the values of an H100 */
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = 9;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = 227 * 1024;
    break;
  default:
    *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)&a_context;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)&a_context;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

/* A function handle is a copy of its name. It is never freed: Triton keeps it for as long as the process lives. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)&a_module;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

/* The tensors are in host memory, whose pointers are used as device pointers. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return CUDA_ERROR_NOT_SUPPORTED;
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (extra || stub_launch.count > MOST_PARAMETERS)
    return CUDA_ERROR_INVALID_VALUE;
  stub_launch.launches++;
  stub_launch.grid[0] = config->gridDimX;
  stub_launch.grid[1] = config->gridDimY;
  stub_launch.grid[2] = config->gridDimZ;
  stub_launch.block[0] = config->blockDimX;
  stub_launch.block[1] = config->blockDimY;
  stub_launch.block[2] = config->blockDimZ;
  stub_launch.shared = config->sharedMemBytes;
  stub_launch.attributes = config->numAttrs;
  stub_launch.stream = config->hStream;
  stub_launch.kernel = (const char *)function;
  for (int i = 0; i < stub_launch.count; i++) {
    if (stub_launch.sizes[i] > MOST_BYTES)
      return CUDA_ERROR_INVALID_VALUE;
    memcpy(stub_launch.parameters[i], parameters[i], stub_launch.sizes[i]);
  }
  return CUDA_SUCCESS;
}

/* Our kernels never call these, but Triton's module cannot be loaded without them. */
CUresult cuDriverGetVersion(int *version) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return CUDA_ERROR_NOT_SUPPORTED; }
