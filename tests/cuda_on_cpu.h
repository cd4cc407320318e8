// As much of CUDA and ATen as DeepSpeed's Adam kernel uses, for a CPU: its threads run one after the other.
#pragma once
#include <climits>
#include <cmath>
#include <cstdint>
#include <vector>

#define __device__
#define __forceinline__ inline

struct Place { int x = 0; };
static Place blockIdx, blockDim, threadIdx;

namespace at {
struct Tensor {
    float* data;
    int64_t size;
    int64_t numel() const { return size; }
    int scalar_type() const { return 0; }
};
}  // namespace at

template <int n>
struct TensorListMetadata {
    void* addresses[n][1];
    int64_t sizes[1];
    unsigned char block_to_tensor[1];
    int block_to_chunk[1];
};

template <int depth, typename Functor, typename... Args>
void multi_tensor_apply(int64_t block_size, int64_t chunk_size, const at::Tensor&,
                        const std::vector<std::vector<at::Tensor>>& lists, Functor functor, Args... args)
{
    blockDim.x = block_size;
    for (size_t t = 0; t < lists[0].size(); t++) {
        TensorListMetadata<depth> tl{};
        tl.sizes[0] = lists[0][t].numel();
        for (int d = 0; d < depth; d++) tl.addresses[d][0] = lists[d][t].data;
        for (int64_t chunk = 0; chunk * chunk_size < tl.sizes[0]; chunk++) {
            tl.block_to_chunk[0] = chunk;
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) functor(chunk_size, nullptr, tl, args...);
        }
    }
}

#define DISPATCH_DOUBLE_FLOAT_AND_HALF(type, level, name, ...) \
    {                                                          \
        using scalar_t_0 = float;                              \
        __VA_ARGS__                                            \
    }
#define AT_CUDA_CHECK(call)
