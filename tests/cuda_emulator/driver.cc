// As much of the CUDA driver as tests/gpu/driver.py calls, with the host's memory as the device's.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuInit(unsigned) { return 0; }
EXPORT int cuDeviceGet(int* device, int number) {
  *device = number;
  return 0;
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = nullptr;
  return 0;
}
EXPORT int cuCtxSetCurrent(void*) { return 0; }
EXPORT int cuCtxSynchronize() { return 0; }
EXPORT int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  // As the driver's: aligned, and not of old memory's values.
  void* memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (memory == nullptr) return 2;
  memset(memory, 0x3c, bytes);
  *address = reinterpret_cast<uint64_t>(memory);
  return 0;
}
EXPORT int cuMemFree_v2(uint64_t address) {
  free(reinterpret_cast<void*>(address));
  return 0;
}
EXPORT int cuMemsetD8_v2(uint64_t address, unsigned char byte, size_t bytes) {
  memset(reinterpret_cast<void*>(address), byte, bytes);
  return 0;
}
EXPORT int cuMemcpyHtoD_v2(uint64_t target, const void* source, size_t bytes) {
  memcpy(reinterpret_cast<void*>(target), source, bytes);
  return 0;
}
EXPORT int cuMemcpyDtoH_v2(void* target, uint64_t source, size_t bytes) {
  memcpy(target, reinterpret_cast<const void*>(source), bytes);
  return 0;
}
EXPORT int cuGetErrorString(int, const char** text) {
  *text = "out of memory";
  return 0;
}
