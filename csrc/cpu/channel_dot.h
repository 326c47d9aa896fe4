// The plan of channel_dot, which weight_dot uses too where one side of the weight has a single channel.
#pragma once

#include <memory>

#include "layout.h"

namespace obc::cpu {

std::unique_ptr<Plan> plan_channel_dot(const Pair& pair, int64_t channel_dim, bool per_sample, void* out);

}  // namespace obc::cpu
