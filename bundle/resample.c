/* Pillow's Image.resize of RGB pictures, to the last bit, in a sixth of its time: loops that compilers make
   vector instructions of. bundle/resample.py calls it and says when; bundle/compile.sh compiles it.

   Two passes, each with 22 bits of fraction and rounded to 8 bits, as Pillow 13 has them. A pixel is one int32,
   red in its lowest byte, as in Pillow's memory. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined __x86_64__ && defined __GLIBC__
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline)) /* into each of the clones */

enum { FRACTION = 32 - 8 - 2, LANES = 16, WIDEST = 1 << 15 };
enum { LANCZOS = 1, BILINEAR = 2, BICUBIC = 3 }; /* PIL.Image.Resampling */

/* Output i is the weighted sum of the inputs first[i], first[i] + 1, ... first[i] + count[i] - 1. */
typedef struct {
  int size, from, to; /* outputs; the inputs that any of them needs */
  int *first, *count, most;
  int32_t *weight; /* [size][most] */
} taps;

static double filter(int name, double x) {
  x = fabs(x);
  if (name == BILINEAR) return x < 1 ? 1 - x : 0;
  if (name == BICUBIC) /* Keys 1981, a = -0.5 */
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
  if (x == 0) return 1;
  if (x >= 3) return 0;
  double a = x * M_PI, b = x / 3 * M_PI;
  return sin(a) / a * (sin(b) / b);
}

/* inputs: how many there are, of which from .. to become `size` outputs. Returns 0, or -1 without memory. */
static int plan(taps *t, int name, int inputs, float from, float to, int size) {
  double scale = (double)(to - from) / size, stretch = scale < 1 ? 1 : scale, squeeze = 1 / stretch;
  double support = (name == LANCZOS ? 3 : name == BICUBIC ? 2 : 1) * stretch;
  t->size = size;
  t->most = (int)ceil(support) * 2 + 1;
  t->first = malloc(size * sizeof *t->first);
  t->count = malloc(size * sizeof *t->count);
  t->weight = malloc((size_t)size * t->most * sizeof *t->weight);
  double *exact = malloc(t->most * sizeof *exact);
  if (!t->first || !t->count || !t->weight || !exact) {
    free(exact);
    return -1;
  }
  for (int i = 0; i < size; i++) {
    double centre = from + (i + 0.5) * scale, sum = 0;
    int first = (int)(centre - support + 0.5), end = (int)(centre + support + 0.5);
    if (first < 0) first = 0;
    if (end > inputs) end = inputs;
    for (int k = first; k < end; k++) sum += exact[k - first] = filter(name, (k - centre + 0.5) * squeeze);
    for (int k = 0; k < end - first; k++) {
      double weight = (sum ? exact[k] / sum : exact[k]) * (1 << FRACTION);
      t->weight[(size_t)i * t->most + k] = (int32_t)(weight + (weight < 0 ? -0.5 : 0.5));
    }
    t->first[i] = first;
    t->count[i] = end - first;
  }
  free(exact);
  t->from = t->first[0];
  t->to = t->first[size - 1] + t->count[size - 1];
  return 0;
}

INLINE int32_t rounded(int32_t sum) {
  sum >>= FRACTION;
  return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

/* One output of LANES lines side by side; its inputs lie `step` pixels apart. */
INLINE void weigh(const int32_t *restrict in, size_t step, const taps *t, int i, int32_t *restrict out) {
  const int32_t *weight = t->weight + (size_t)i * t->most;
  int32_t red[LANES], green[LANES], blue[LANES];
  for (int l = 0; l < LANES; l++) red[l] = green[l] = blue[l] = 1 << (FRACTION - 1);
  for (int k = 0; k < t->count[i]; k++, in += step)
    for (int l = 0; l < LANES; l++) {
      red[l] += (in[l] & 255) * weight[k];
      green[l] += (in[l] >> 8 & 255) * weight[k];
      blue[l] += (in[l] >> 16 & 255) * weight[k];
    }
  for (int l = 0; l < LANES; l++) out[l] = rounded(red[l]) | rounded(green[l]) << 8 | rounded(blue[l]) << 16;
}

/* Rows of any width -> rows of t->size pixels. strip holds LANES rows, turned so that a column's lie together. */
FOR_EACH_PROCESSOR static void across(const int32_t *restrict in, size_t in_width, int rows, const taps *t,
                                      int32_t *restrict strip, int32_t *restrict out, size_t out_width) {
  for (int top = 0; top < rows; top += LANES, in += LANES * in_width, out += LANES * out_width) {
    int height = rows - top < LANES ? rows - top : LANES;
    for (int y = 0; y < height; y++)
      for (int x = t->from; x < t->to; x++) strip[(x - t->from) * LANES + y] = in[y * in_width + x];
    for (int x = 0; x < t->size; x++) {
      int32_t column[LANES];
      weigh(strip + (t->first[x] - t->from) * LANES, LANES, t, x, column);
      for (int y = 0; y < height; y++) out[y * out_width + x] = column[y];
    }
  }
}

/* Rows t->from and after -> t->size rows. width is LANES at least: where it is no multiple, the last lanes overlap. */
FOR_EACH_PROCESSOR static void down(const int32_t *restrict in, size_t width, const taps *t, int32_t *restrict out) {
  for (int y = 0; y < t->size; y++, out += width)
    for (size_t left = 0; left < width; left += LANES) {
      size_t x = left + LANES <= width ? left : width - LANES;
      weigh(in + (t->first[y] - t->from) * width + x, width, t, y, out + x);
    }
}

/* One picture's way: what its rows become across, and then down, or the other way round. */
typedef struct {
  taps x, y;
  int in_width, down_first; /* rounded in between, the order makes a difference */
  size_t padded;            /* pixels of a row of `half`, `whole` */
  int32_t *strip, *half, *whole;
} job;

/* The box of a picture of in_width x in_height. Returns 0, or -1 where there is no memory, the box is not within the
   picture, or that is narrower than LANES or so wide that LANES of its rows would take more memory than all else: Pillow
   knows what to do then. */
static int begin(job *j, int in_width, int in_height, int name, const float box[4], int width, int height) {
  if (in_width < LANES || in_width > WIDEST) return -1;
  if (!(0 <= box[0] && box[0] < box[2] && box[2] <= in_width)) return -1; /* nor where one is no number */
  if (!(0 <= box[1] && box[1] < box[3] && box[3] <= in_height)) return -1;
  if (plan(&j->x, name, in_width, box[0], box[2], width) || plan(&j->y, name, in_height, box[1], box[3], height))
    return -1;
  j->in_width = in_width;
  /* Pillow goes down first what shrinks much more in height. */
  j->down_first = in_height > height && in_height - height > 2 * (in_width - width);
  return 0;
}

/* Memory for rows of j->in_width. Returns 0, or -1 where there is none. */
static int make_room(job *j) {
  j->padded = (j->x.size + LANES - 1) / LANES * LANES;
  size_t half = j->down_first ? (size_t)j->y.size * j->in_width : (size_t)(j->y.to - j->y.from) * j->padded;
  j->strip = malloc((size_t)(j->x.to - j->x.from) * LANES * sizeof *j->strip);
  j->half = malloc(half * sizeof *j->half);
  j->whole = malloc(j->y.size * j->padded * sizeof *j->whole);
  return j->strip && j->half && j->whole ? 0 : -1;
}

/* `rows` rows, which are y.from + first and those after it: all at once, or LANES and again LANES where not
   down_first. */
static void take(job *j, const int32_t *in, int first, int rows) {
  if (j->down_first) {
    down(in, j->in_width, &j->y, j->half);
    across(j->half, j->in_width, j->y.size, &j->x, j->strip, j->whole, j->padded);
  } else
    across(in, j->in_width, rows, &j->x, j->strip, j->half + first * j->padded, j->padded);
}

/* out: uint8 [height][width][3]. */
static void give(job *j, uint8_t *out) {
  if (!j->down_first) down(j->half, j->padded, &j->y, j->whole);
  for (int row = 0; row < j->y.size; row++)
    for (int column = 0; column < j->x.size; column++, out += 3) memcpy(out, &j->whole[row * j->padded + column], 3);
}

static void end(job *j) {
  free(j->x.first), free(j->x.count), free(j->x.weight), free(j->y.first), free(j->y.count), free(j->y.weight);
  free(j->strip), free(j->half), free(j->whole);
}

/* https://arrow.apache.org/docs/format/CDataInterface.html */
struct ArrowArray {
  int64_t length, null_count, offset, n_buffers, n_children;
  const void **buffers;
  struct ArrowArray **children, *dictionary;
  void (*release)(struct ArrowArray *);
  void *private_data;
};

/* The box (left, top, right, bottom) of a picture, an RGB image of Pillow's exported to Arrow -> out. As begin. */
int resample(const struct ArrowArray *picture, int in_width, int in_height, int name, const float box[4], int width,
             int height, uint8_t *out) {
  job j = {0};
  int failed = begin(&j, in_width, in_height, name, box, width, height) || make_room(&j) ? -1 : 0;
  if (!failed) {
    const int32_t *in = picture->children[0]->buffers[1];
    take(&j, in + (size_t)j.y.from * in_width, 0, j.y.to - j.y.from);
    give(&j, out);
  }
  end(&j);
  return failed;
}
