/* Eight numbers at a time, with the vector extensions of GCC and Clang, and functions of them.
 *
 * On x86 they want AVX2 and FMA, which `supported` asks for when it runs; elsewhere the compiler makes of 8 numbers what
 * the processor has. What is not a number stays so in every function here.
 */
#if defined(__x86_64__)
#define FAST __attribute__((target("avx2,fma")))
#else
#define FAST
#endif
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline)) FAST

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int mask __attribute__((vector_size(32)));
typedef Py_ssize_t size;

enum { LANE = 8 };

INLINE vec spread(float x) { return (vec){x, x, x, x, x, x, x, x}; }
INLINE vec load(const float *at) { return *(const vec *)at; }
INLINE void store(float *at, vec v) { *(vec *)at = v; }
INLINE vec choose(mask which, vec yes, vec no) { return (vec)(((mask)yes & which) | ((mask)no & ~which)); }
INLINE vec clamp(vec x, float low, float high)
{
    x = choose(x > spread(high), spread(high), x);
    return choose(x < spread(low), spread(low), x);
}
INLINE vec positive(vec x) { return choose(x < spread(0), -x, x); }

INLINE float total(vec v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

/* tanh by a quotient of polynomials of degree 13 and 6, within 2.5e-7 of it; the coefficients are of this form's
 * minimax fit, which Eigen and others use too. */
INLINE vec hyperbolic_tangent(vec x)
{
    x = clamp(x, -7.90531110763549805f, 7.90531110763549805f); /* the quotient is 1 there */
    vec s = x * x;
    vec above = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
    above = above * s - 8.60467152213735e-11f;
    above = above * s + 5.12229709037114e-08f;
    above = above * s + 1.48572235717979e-05f;
    above = above * s + 6.37261928875436e-04f;
    above = above * s + 4.89352455891786e-03f;
    vec below = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
    below = below * s + 2.26843463243900e-03f;
    below = below * s + 4.89352518554385e-03f;
    return x * above / below;
}

/* exp by 2^n and a polynomial on half an octave around 0 (Cephes), within two roundings; 0 below -87.3. */
INLINE vec exponential(vec x)
{
    const vec shift = spread(12582912.0f); /* 1.5 * 2^23: what is added to it is rounded to a whole number */
    vec bounded = clamp(x, -87.3f, 89.0f);
    vec n = (bounded * 1.44269504088896341f + shift) - shift;
    vec r = bounded - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1;
    mask whole = __builtin_convertvector(choose(x == x, n, spread(0)), mask), half = whole >> 1;
    p = p * (vec)((half + 127) << 23) * (vec)((whole - half + 127) << 23); /* 2^n itself may be too large */
    return choose(x < spread(-87.3f), spread(0), p);
}

/* (exp(x) - 1 - x) / x^2 where |x| is small. */
INLINE vec above_tangent_by_square(vec x)
{
    vec p = x * 2.48015873e-5f + 1.98412698e-4f;
    p = p * x + 1.38888889e-3f;
    p = p * x + 8.33333333e-3f;
    p = p * x + 4.16666667e-2f;
    p = p * x + 1.66666667e-1f;
    return p * x + 0.5f;
}

/* exp(x) - 1 - x, and exp(x) - 1, with all digits where x is small. */
INLINE vec above_tangent(vec x, vec exponential_of)
{
    return choose(positive(x) < spread(0.5f), above_tangent_by_square(x) * x * x, exponential_of - 1 - x);
}
INLINE vec exponential_less_one(vec x)
{
    return choose(positive(x) < spread(0.5f), above_tangent_by_square(x) * x * x + x, exponential(x) - 1);
}

/* Natural logarithm of normal positive numbers (Cephes), within two roundings. */
INLINE vec logarithm(vec x)
{
    mask exponent = (((mask)x >> 23) & 255) - 126;
    vec m = (vec)(((mask)x & 0x007fffff) | 0x3f000000); /* [0.5, 1) */
    mask low = m < spread(0.707106781186547524f);
    vec e = __builtin_convertvector(exponent + low, vec); /* what is true is -1 */
    m = choose(low, m + m, m) - 1;
    vec p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    vec z = m * m, y = p * m * z;
    y = y + e * -2.12194440e-4f - z * 0.5f;
    y = m + y + e * 0.693359375f;
    return choose(x == x, y, x);
}
