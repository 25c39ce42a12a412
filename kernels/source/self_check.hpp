// Whether a level computes what another does: levels whose processors were not at hand prove
// themselves where they are to be used.
//
// Owns   a few fixed products of each kind: about a millisecond.
#pragma once

#include "product.hpp"

namespace minigpt4 {

bool agree(const Kernels& kernels, const Kernels& reference);

}  // namespace minigpt4
