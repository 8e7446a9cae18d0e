// How an apply kernel tells the host that a packet's header is wrong or that channels are not finite, without the host
// waiting for it.
#ifndef HVD_SYNCBN_CUDA_REPORTS_H_
#define HVD_SYNCBN_CUDA_REPORTS_H_

#include "apply.cuh"

namespace hvd_syncbn {
namespace cuda {

// The report of the next launch on the current device; none without a packet.
cudaError_t make_report(const int64_t* packet, const char* layer, void* stream, Report* report);

// After that launch: what it returned, or an error of this.
cudaError_t close_report(const Report& report, cudaError_t launched, void* stream);

}  // namespace cuda
}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_CUDA_REPORTS_H_
