// The state of obc.select's greedy choice: the caller's arrays, changed in place.
#pragma once

#include <cstdint>
#include <vector>

namespace obc::cpu {

// The rows of units among those of more units: that of unit u begins at data + places[u] * stride.
struct Rows {
  const double* data;
  int64_t stride, columns;
  const int64_t* places;

  const double* at(int64_t unit) const { return data + places[unit] * stride; }
};

// products[u] = the product of the row of unit u with `vector` (columns,), in one thread.
void row_products(const Rows& rows, int64_t units, const double* vector, double* products);

// `units` units in `groups` groups side by side. Names are those of python/obc/selection/greedy.py.
struct Greedy {
  int64_t units, groups;
  const int64_t* sizes;            // (groups,)
  const double* lowest_widths;     // (groups,)
  const double* curvature;         // (groups, groups)
  const double* unit_costs;        // (units,), or null
  const double* squares;           // (units,)
  const double* rounding_of;       // (units,)
  const double* rounding_by_norm;  // (units,)
  bool per_cost;
  bool interacting;
  double column_factor;  // twice the strength of interactions

  double* increments;  // (units,), infinite where a unit is gone
  double* widths;      // (groups,)
  double* slope;       // (groups,)
  double* removed_squares;
  double* freed;

  // Adds the column of the unit removed last, if given, and removes the next unit: returns it, or -1 if none may be
  // removed. Where `reach` (groups,) is given and a unit is removed, fills it for find_rivals.
  int64_t step(const double* column, double* reach);

  // Up to `count` steps, until `target` is freed, and the number of those in which a unit was removed. Fills for each
  // the removed unit, reach (groups,), and the state after it: widths, slope, removed_squares and freed side by side.
  int64_t run(const Rows& rows, double target, int64_t count, int64_t* removed, double* reach, double* states);

 private:
  struct Proposal {
    int64_t unit;
    double freed;
    double score;
    double limit;  // the lowest upper bound of the group's scores
  };

  void fill_reach(double best, double* reach) const;

  double rounding(int64_t unit) const;
  double score(int64_t unit) const;
  double upper(int64_t unit) const;
  int64_t first_of(int64_t begin, int64_t end, double& lowest) const;

  std::vector<Proposal> proposals_;
  double norm_ = 0;  // of the rows removed so far
};

// A range of units that took no part in `moments` steps, or in some of them, of other units.
struct Bystanders {
  int64_t units, moments;
  const int64_t* groups;     // (units,)
  const float* products;     // (units, moments) of each unit's row / its norm with sums of removed rows
  const double* increments;  // (units,) before these steps
  const double* inverse;     // (units,) products = inverse * changes of increments
  const double* unit_costs;  // (units,), or null
  const double* reach;       // (groups, moments), of Greedy::step, per unit cost
  const double* slack;       // (moments,) by how much products may be too large
};

// Sets found[u] to 1 where at some moment a unit may have come within reach of being removed, else to 0.
void find_rivals(const Bystanders& bystanders, uint8_t* found);

}  // namespace obc::cpu
