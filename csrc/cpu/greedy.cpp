// Steps of the greedy choice of obc.select for single units, defined by python/obc/selection/greedy.py.
//
// A step reads the units once group by group, and each group's units up to its first candidate once more from the
// first-level cache. It runs in one thread, because steps depend on each other and even the widest take a fraction of a
// millisecond.

#include "greedy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "leaves.h"

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
int64_t Greedy::first_of(int64_t begin, int64_t end, double& lowest) const {
  double lanes[kLanes];
  for (double& lane : lanes) lane = kInfinity;
  int64_t unit = begin;
  for (; unit + kLanes <= end; unit += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const double bound = upper(unit + i);
      lanes[i] = bound < lanes[i] ? bound : lanes[i];
    }
  }
  lowest = kInfinity;
  for (const double lane : lanes) lowest = lane < lowest ? lane : lowest;
  for (; unit < end; ++unit) {
    const double bound = upper(unit);
    lowest = bound < lowest ? bound : lowest;
  }
  for (unit = begin; unit + 1 < end && !(score(unit) <= lowest);) ++unit;
  return unit;
}

// Units elsewhere change nothing in a step if each one's score is above all of reach: the best upper bound, and the
// lowest one of every group in which any unit can't be told from the best. Such a unit is then neither the lowest of
// its group nor equal to it. `reach` holds this as an increment, of any unit of the group at the group's cost; with
// costs of units, as the score itself.
void Greedy::fill_reach(double best, double* reach) const {
  double highest = best;
  for (int64_t group = 0, begin = 0; group < groups; begin += sizes[group], ++group) {
    const Proposal& proposal = proposals_[group];
    if (!(proposal.score < kInfinity)) continue;
    for (int64_t unit = begin; unit < begin + sizes[group]; ++unit) {
      const double score_of_unit = per_cost && !unit_costs ? quotient(increments[unit], proposal.freed) : score(unit);
      if (score_of_unit <= best) highest = std::max(highest, proposal.limit);
    }
  }
  highest += 8 * std::numeric_limits<double>::epsilon() * std::abs(highest);  // quotients are rounded
  for (int64_t group = 0; group < groups; ++group) {
    const double cost = unit_costs || !per_cost ? 1 : slope[group] - curvature[group * groups + group];
    const bool stays = widths[group] - 1 < lowest_widths[group] || cost <= 0;
    reach[group] = stays ? -kInfinity : highest < 0 ? highest / cost : highest * cost;
  }
}

int64_t Greedy::step(const double* column, double* reach) {
  if (column) {
    for (int64_t unit = 0; unit < units; ++unit) increments[unit] += column[unit] * column_factor;
  }
  proposals_.resize(groups);
  norm_ = std::sqrt(*removed_squares);
  double best = kInfinity;
  for (int64_t group = 0, begin = 0; group < groups; begin += sizes[group], ++group) {
    Proposal& proposal = proposals_[group];
    proposal.score = kInfinity;
    if (widths[group] - 1 < lowest_widths[group] || sizes[group] == 0) continue;
    double lowest;
    proposal.unit = first_of(begin, begin + sizes[group], lowest);
    proposal.freed = unit_costs ? unit_costs[proposal.unit] : slope[group] - curvature[group * groups + group];
    if (proposal.freed <= 0) continue;
    const double increment = increments[proposal.unit], bound = increment + rounding(proposal.unit);
    proposal.score = per_cost ? quotient(increment, proposal.freed) : increment;
    const double limit = per_cost ? quotient(bound, proposal.freed) : bound;
    proposal.limit = per_cost && !unit_costs ? quotient(lowest, proposal.freed) : lowest;
    best = limit < best ? limit : best;
  }
  if (!(best < kInfinity)) return -1;
  if (reach) fill_reach(best, reach);
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

int64_t Greedy::run(const Rows& rows, double target, int64_t count, int64_t* removed, double* reach, double* states) {
  std::vector<double> products(units);
  int64_t done = 0;
  for (; done < count && *freed < target; ++done) {
    const int64_t unit = step(nullptr, reach + done * groups);
    if (unit < 0) break;
    removed[done] = unit;
    states = std::copy_n(widths, groups, states);
    states = std::copy_n(slope, groups, states);
    *states++ = *removed_squares;
    *states++ = *freed;
    if (!interacting || squares[unit] == 0) continue;
    row_products(rows, units, rows.at(unit), products.data());
    for (int64_t other = 0; other < units; ++other) increments[other] += column_factor * products[other];
  }
  return done;
}

void row_products(const Rows& rows, int64_t units, const double* vector, double* products) {
  const Leaves<double>& kernels = leaves<double>(Dtype::float64);
  for (int64_t unit = 0; unit < units; ++unit) {
    kernels.row_dots({rows.at(unit), 0, nullptr}, {vector, 0, nullptr}, 1, rows.columns, products + unit, 1);
  }
}

#if defined(OBC_X86_DISPATCH)
__attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
void find_rivals(const Bystanders& all, uint8_t* found) {
  const int64_t moments = all.moments;
  for (int64_t unit = 0; unit < all.units; ++unit) {
    const float* const products = all.products + unit * moments;
    const double* const reach = all.reach + all.groups[unit] * moments;
    const double increment = all.increments[unit], inverse = all.inverse[unit];
    int64_t beyond = 0;  // compared in a way that holds for no not-a-number
    if (all.unit_costs) {
      const double cost = all.unit_costs[unit];
      for (int64_t m = 0; m < moments; ++m) {
        const double least = reach[m] < 0 ? reach[m] / cost : reach[m] * cost;
        beyond += products[m] > (least - increment) * inverse + all.slack[m];
      }
    } else {
      for (int64_t m = 0; m < moments; ++m) {
        beyond += products[m] > (reach[m] - increment) * inverse + all.slack[m];
      }
    }
    found[unit] = beyond < moments;
  }
}

}  // namespace obc::cpu
