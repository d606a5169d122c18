/* JPEG to resized pixels, what Pillow makes of it to the last bit, by Pillow's own libjpeg-turbo: only the rows and
   columns that are needed, a few rows at a time, which stay in the CPU's caches. bundle/jpeg.py calls it and says when;
   bundle/compile.sh compiles it, where libjpeg's headers are, and with it all of resample.c. */

#include "resample.c"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>

#include <jpeglib.h>

enum { MARGIN = 32 }; /* pixels beside and rows above what is needed: next to where a picture is cut they differ */

/* libjpeg's functions, found in Pillow's and made known to nobody else: other libraries here may bring another one. */
#define EACH(F) \
  F(std_error) F(CreateDecompress) F(mem_src) F(read_header) F(start_decompress) F(crop_scanline) F(skip_scanlines) \
  F(read_scanlines) F(finish_decompress) F(destroy_decompress)
#define POINTER(name) __typeof__(jpeg_##name) *name;
static struct { EACH(POINTER) } jpeg;

/* path: of libjpeg-turbo. Returns 0, or -1 where it is not there or lacks a function. */
int jpeg_use(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
#define FIND(name) || !(jpeg.name = (__typeof__(jpeg.name))dlsym(library, "jpeg_" #name))
  return !library EACH(FIND) ? -1 : 0;
}

static unsigned two(const uint8_t *at, int little) { return little ? at[0] | at[1] << 8 : at[0] << 8 | at[1]; }

static uint32_t four(const uint8_t *at, int little) {
  uint32_t first = two(at, little), second = two(at + 2, little);
  return little ? second << 16 | first : first << 16 | second;
}

/* Whether a segment says that the picture is upright: Exif's tag 0x0112 (CIPA DC-008, section 4.6.4 A) in TIFF's first
   directory (TIFF 6.0, section 2). Where it does not say, Pillow looks elsewhere. */
static int upright(const uint8_t *segment, size_t size) {
  if (size < 14 || memcmp(segment, "Exif\0\0", 6)) return 0;
  const uint8_t *tiff = segment + 6;
  size -= 6;
  int little = tiff[0] == 'I';
  if (memcmp(tiff, little ? "II*\0" : "MM\0*", 4)) return 0;
  size_t at = four(tiff + 4, little);
  if (at > size - 2) return 0;
  unsigned entries = two(tiff + at, little);
  if (at + 2 + 12 * (size_t)entries > size) return 0;
  for (const uint8_t *entry = tiff + at + 2; entries--; entry += 12)
    if (two(entry, little) == 0x0112)
      return two(entry + 2, little) == 3 && four(entry + 4, little) == 1 && two(entry + 8, little) == 1;
  return 0;
}

/* found: the width and height of an upright JPEG of three colours with 8 bits each. Returns 0, or -1 where it is
   another picture, or has anything unusual before its first scan (ITU-T T.81, annex B): Pillow knows what to make of
   that. */
int jpeg_size(const uint8_t *data, size_t size, int *found) {
  int frames = 0, exif = 0;
  if (size < 2 || two(data, 0) != 0xFFD8) return -1;
  for (size_t at = 2; at + 4 <= size;) {
    unsigned marker = two(data + at, 0), length = two(data + at + 2, 0);
    const uint8_t *segment = data + at + 4;
    at += 2 + length;
    if (length < 2 || at > size) return -1;
    length -= 2;
    switch (marker) {
    case 0xFFC0: /* frames: baseline, extended, progressive */
    case 0xFFC1:
    case 0xFFC2:
      if (frames++ || length != 15 || segment[0] != 8 || segment[5] != 3) return -1;
      found[0] = two(segment + 3, 0), found[1] = two(segment + 1, 0);
      break;
    case 0xFFE0: /* JFIF */
      if (length < 14) return -1;
      break;
    case 0xFFE1:
      if (exif++ || !upright(segment, length)) return -1;
      break;
    case 0xFFE2: /* a colour profile, which is not used; but not several pictures */
      if (length < 12 || memcmp(segment, "ICC_PROFILE", 12)) return -1;
      break;
    case 0xFFC4: /* tables, Adobe's, comments */
    case 0xFFDB:
    case 0xFFDD:
    case 0xFFEE:
    case 0xFFFE: break;
    case 0xFFDA: /* a scan */ return frames && found[0] && found[1] ? 0 : -1;
    default: return -1;
    }
  }
  return -1;
}

typedef struct {
  struct jpeg_error_mgr error; /* first: libjpeg knows it by its address */
  jmp_buf failed;
  struct jpeg_decompress_struct info;
  const uint8_t *data;
  size_t size;
  int shrink, name, width, height;
  const float *box;
  job job;
  int32_t *rows;
} decoder;

static void fail(j_common_ptr info) { longjmp(((decoder *)info->err)->failed, 1); }
static void say_nothing(j_common_ptr info) { (void)info; }

/* All rows through d->job. Returns 0 or -1. */
static int decode(decoder *d) {
  struct jpeg_decompress_struct *info = &d->info;
  job *j = &d->job;
  if (setjmp(d->failed)) return -1; /* libjpeg's errors end up here */
  jpeg.CreateDecompress(info, JPEG_LIB_VERSION, sizeof *info);
  jpeg.mem_src(info, d->data, d->size);
  jpeg.read_header(info, TRUE);
  info->scale_num = 1, info->scale_denom = d->shrink;
  info->out_color_space = JCS_EXT_RGBX;
  jpeg.start_decompress(info);
  if (begin(j, info->output_width, info->output_height, d->name, d->box, d->width, d->height)) return -1;

  JDIMENSION left = j->x.from < MARGIN ? 0 : j->x.from - MARGIN, right = j->x.to + MARGIN;
  JDIMENSION wide = (right < info->output_width ? right : info->output_width) - left;
  if (wide < info->output_width) {
    jpeg.crop_scanline(info, &left, &wide);
    for (int i = 0; i < d->width; i++) j->x.first[i] -= left;
    j->x.from -= left, j->x.to -= left;
    j->in_width = wide;
  }
  /* libjpeg writes rows that begin at a multiple of 32 bytes past the caches, and they are read next: so none does. */
  j->in_width = (j->in_width + 3) / 4 * 4;
  int most = j->down_first ? j->y.to - j->y.from : LANES;
  d->rows = malloc(((size_t)most * j->in_width + 1) * sizeof *d->rows);
  if (!d->rows || make_room(j)) return -1;
  int32_t *rows = d->rows + 1;
  if (j->y.from > MARGIN) jpeg.skip_scanlines(info, j->y.from - MARGIN);
  for (int first = 0, have = 0, y; (y = info->output_scanline) < j->y.to;) {
    JSAMPROW at[] = {(JSAMPROW)(rows + (size_t)have * j->in_width), (JSAMPROW)(rows + (size_t)(have + 1) * j->in_width)};
    int two_more = y >= j->y.from && y + 1 < j->y.to && have + 1 < most; /* it gives no more at once */
    int read = jpeg.read_scanlines(info, at, two_more ? 2 : 1);
    if (y < j->y.from) continue;
    have += read;
    if (have < most && y + read < j->y.to) continue;
    take(j, rows, first, have);
    first += have, have = 0;
  }
  /* All of them: who skips the last one is not told that the file is cut off. */
  for (JDIMENSION more; (more = info->output_height - info->output_scanline);) {
    JSAMPROW at = (JSAMPROW)rows;
    if (more > 1)
      jpeg.skip_scanlines(info, more - 1);
    else
      jpeg.read_scanlines(info, &at, 1);
  }
  jpeg.finish_decompress(info);
  return d->error.num_warnings ? -1 : 0;
}

/* The box of a JPEG that jpeg_size knows, as decoded to a `shrink`-th of its size -> out, uint8 [height][width][3].
   Returns 0, or -1 where that cannot be, or something is wrong with it, which Pillow may yet forgive. */
int jpeg_resample(const uint8_t *data, size_t size, int shrink, int name, const float box[4], int width, int height,
                  uint8_t *out) {
  decoder d = {
      .data = data, .size = size, .shrink = shrink, .name = name, .width = width, .height = height, .box = box};
  d.info.err = jpeg.std_error(&d.error);
  d.error.error_exit = fail;
  d.error.output_message = say_nothing;
  int failed = decode(&d);
  if (!failed) give(&d.job, out);
  jpeg.destroy_decompress(&d.info);
  end(&d.job);
  free(d.rows);
  return failed;
}
