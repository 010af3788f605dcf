// Which kernels this machine can run.
#pragma once

#include <vector>

#include "kernel.h"

namespace karma {

std::vector<const Kernel*> kernels();          // the fastest first
const Kernel* exact_kernel();                  // null: none here gives defined scores by itself
const Kernel* kernel_named(const char* name);  // null: none, or not on this machine

}  // namespace karma
