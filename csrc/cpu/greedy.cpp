// One step of the greedy choice of obc.select for single units, defined by python/obc/selection/greedy.py.
//
// A step reads the units once group by group, and each group's units up to its first candidate once more from the
// first-level cache. It runs in one thread, because steps depend on each other and even the widest take a fraction of a
// millisecond.

#include "greedy.h"

#include <cmath>
#include <limits>

namespace obc::cpu {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kLanes = 8;

// increment / cost, or increment * cost for negative increments.
inline double quotient(double increment, double cost) { return increment < 0 ? increment * cost : increment / cost; }

}  // namespace

double Greedy::rounding(int64_t unit) const {
  return interacting ? rounding_of[unit] + rounding_by_norm[unit] * norm_ : rounding_of[unit];
}

double Greedy::score(int64_t unit) const {
  return unit_costs && per_cost ? quotient(increments[unit], unit_costs[unit]) : increments[unit];
}

double Greedy::upper(int64_t unit) const {
  const double bound = increments[unit] + rounding(unit);
  return unit_costs && per_cost ? quotient(bound, unit_costs[unit]) : bound;
}

// The first unit of [begin, end) that can't be told from the one with the lowest upper bound.
int64_t Greedy::first_of(int64_t begin, int64_t end) const {
  double lanes[kLanes];
  for (double& lane : lanes) lane = kInfinity;
  int64_t unit = begin;
  for (; unit + kLanes <= end; unit += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const double bound = upper(unit + i);
      lanes[i] = bound < lanes[i] ? bound : lanes[i];
    }
  }
  double lowest = kInfinity;
  for (const double lane : lanes) lowest = lane < lowest ? lane : lowest;
  for (; unit < end; ++unit) {
    const double bound = upper(unit);
    lowest = bound < lowest ? bound : lowest;
  }
  for (unit = begin; unit + 1 < end && !(score(unit) <= lowest);) ++unit;
  return unit;
}

int64_t Greedy::step(const double* column) {
  if (column) {
    for (int64_t unit = 0; unit < units; ++unit) increments[unit] += column[unit] * column_factor;
  }
  proposals_.resize(groups);
  norm_ = std::sqrt(*removed_squares);
  double best = kInfinity;
  for (int64_t group = 0, begin = 0; group < groups; begin += sizes[group], ++group) {
    Proposal& proposal = proposals_[group];
    proposal.score = kInfinity;
    if (widths[group] - 1 < lowest_widths[group]) continue;
    proposal.unit = first_of(begin, begin + sizes[group]);
    proposal.freed = unit_costs ? unit_costs[proposal.unit] : slope[group] - curvature[group * groups + group];
    if (proposal.freed <= 0) continue;
    const double increment = increments[proposal.unit], bound = increment + rounding(proposal.unit);
    proposal.score = per_cost ? quotient(increment, proposal.freed) : increment;
    const double limit = per_cost ? quotient(bound, proposal.freed) : bound;
    best = limit < best ? limit : best;
  }
  if (!(best < kInfinity)) return -1;
  int64_t group = 0;
  while (!(proposals_[group].score <= best)) ++group;
  const Proposal& chosen = proposals_[group];
  if (interacting) *removed_squares += squares[chosen.unit];
  increments[chosen.unit] = kInfinity;
  widths[group] -= 1;
  for (int64_t other = 0; other < groups; ++other) slope[other] -= 2 * curvature[group * groups + other];
  *freed += chosen.freed;
  return chosen.unit;
}

}  // namespace obc::cpu
