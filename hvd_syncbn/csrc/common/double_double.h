// Double-double arithmetic: sums and products that keep their rounding errors.
#ifndef HVD_SYNCBN_COMMON_DOUBLE_DOUBLE_H_
#define HVD_SYNCBN_COMMON_DOUBLE_DOUBLE_H_

#include "portable.h"

namespace hvd_syncbn {

// An unevaluated sum hi + lo with |lo| <= ulp(hi) / 2. V is a floating-point type or a vector of it.
template <class V>
struct DoubleDouble {
  V hi, lo;
};

template <class V>
HVD_SYNCBN_HD DoubleDouble<V> two_sum(V a, V b) {
  const V s = a + b;
  const V t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

template <class V>
HVD_SYNCBN_HD DoubleDouble<V> quick_two_sum(V a, V b) {  // |a| >= |b|
  const V s = a + b;
  return {s, b - (s - a)};
}

template <class V>
HVD_SYNCBN_HD DoubleDouble<V> add(DoubleDouble<V> a, V b) {
  const DoubleDouble<V> s = two_sum(a.hi, b);
  return quick_two_sum(s.hi, s.lo + a.lo);
}

template <class V>
HVD_SYNCBN_HD DoubleDouble<V> subtract(DoubleDouble<V> a, DoubleDouble<V> b) {
  const DoubleDouble<V> s = two_sum(a.hi, -b.hi);
  const DoubleDouble<V> t = two_sum(a.lo, -b.lo);
  const DoubleDouble<V> u = quick_two_sum(s.hi, s.lo + t.hi);
  return quick_two_sum(u.hi, u.lo + t.lo);
}

template <class V>
HVD_SYNCBN_HD DoubleDouble<V> multiply(DoubleDouble<V> a, DoubleDouble<V> b) {
  const V p = a.hi * b.hi;
  const V e = fused(a.lo, b.hi, fused(a.hi, b.lo, fused(a.hi, b.hi, -p)));
  return quick_two_sum(p, e);
}

template <class V>
HVD_SYNCBN_HD DoubleDouble<V> divide(DoubleDouble<V> a, V n) {
  const V q = a.hi / n;
  const V r = fused(-q, n, a.hi) + a.lo;
  return quick_two_sum(q, r / n);
}

// Returns a + b * c, for a product that does not overflow.
HVD_SYNCBN_HD DoubleDouble<double> add_product(double a, double b, double c) {
  const double product = b * c;
  const DoubleDouble<double> sum = two_sum(a, product);
  return {sum.hi, sum.lo + fused(b, c, -product)};
}

// Converts to T, which may be float.
template <class T>
HVD_SYNCBN_HD DoubleDouble<T> narrowed(DoubleDouble<double> a) {
  const T hi = static_cast<T>(a.hi);
  return {hi, static_cast<T>((a.hi - static_cast<double>(hi)) + a.lo)};
}

}  // namespace hvd_syncbn

#endif  // HVD_SYNCBN_COMMON_DOUBLE_DOUBLE_H_
