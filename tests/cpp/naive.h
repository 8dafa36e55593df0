// The time loop in its plainest form, one sequence and one unit after another in double. The cells are those of csrc/cell
// with a vector of one lane: what this checks is everything around them.
#pragma once

#include "problem.h"

namespace rnnfast::test {

Outputs naive_forward(const Problem& problem, bool training);

// The smallest magnitude of a pre-activation, zeros aside: how far a ReLU is from its kink.
double distance_from_zero(const Problem& problem);

// sum of (what the forward returns) * (its gradient): the loss whose gradients the backward pass returns.
double naive_loss(const Problem& problem);

}  // namespace rnnfast::test
