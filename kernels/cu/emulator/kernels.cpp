// All kernels, for the emulator.
#define TIDEMILL_EMULATOR
#include "cuda.h"

static const emulator::Kernel* kernel_list = nullptr;

#include "../activation.cu"
#include "../attention.cu"
#include "../convert.cu"
#include "../digest.cu"
#include "../embedding.cu"
#include "../hopper_attention.cu"
#include "../hopper_product.cu"
#include "../join.cu"
#include "../matrix_product.cu"
#include "../normalize.cu"
#include "../product.cu"
#include "../prompt_attention.cu"
#include "../quantized_product.cu"
#include "../rotary.cu"
#include "../sampling.cu"

extern "C" const emulator::Kernel* tidemill_emulator_kernels() { return kernel_list; }
