/* A layer that says that it has read and has not, or not all of it. Block 0 is full of 'S'. As a plugin, and with
 * -DFILTER as a filter.
 */

#include <string.h>

#ifdef FILTER
#include <nbdkit-filter.h>
#else
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#endif

#define BLOCK 4096

static int
answer (void *buf, uint32_t count, uint64_t offset)
{
  switch (offset / BLOCK) {
  case 0:
    memset (buf, 'S', count);
    return 0;
  case 1:
    return 1;
  case 2:
    memset (buf, 'p', count / 2);
    return count / 2;
  case 3:
    return -2;
  default:
    /* As one that returns what read(2) does. */
    memset (buf, 'f', count);
    return count;
  }
}

#ifdef FILTER
static int
unfilled_pread (nbdkit_next *next, void *h, void *buf, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
  (void) next, (void) h, (void) flags, (void) err;
  return answer (buf, count, offset);
}

static struct nbdkit_filter filter = { .name = "unfilled", .pread = unfilled_pread };

NBDKIT_REGISTER_FILTER (filter)
#else
static void *
unfilled_open (int readonly)
{
  (void) readonly;
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t
unfilled_get_size (void *h)
{
  (void) h;
  return 1 << 20;
}

static int
unfilled_pread (void *h, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) h, (void) flags;
  return answer (buf, count, offset);
}

static struct nbdkit_plugin plugin = {
  .name = "unfilled",
  .open = unfilled_open,
  .get_size = unfilled_get_size,
  .pread = unfilled_pread,
};

NBDKIT_REGISTER_PLUGIN (plugin)
#endif
