/* A plugin that does what a library should rather not: it has threads of its own, forks, and exits. What a read finds out
 * is what it returns.
 */

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

#define BLOCK 4096

enum what { FORK, PEER, INTERNED, SLEEP, EXIT, BLOCKS };

static const char *early;
static pthread_t threads[4];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t change = PTHREAD_COND_INITIALIZER;
static unsigned started;
static int over;

struct handle {
  const char *name;
};

/* Nobody's connection: whatever is called here is called for none. */
static void *
own_thread (void *unused)
{
  (void) unused;
  nbdkit_debug ("a thread of its own");
  errno = ENOSPC;
  nbdkit_error ("said by a thread: %m");
  if (strcmp (nbdkit_strdup_intern ("a thread's"), "a thread's") != 0 || nbdkit_peer_pid () != -1)
    abort ();
  pthread_mutex_lock (&lock);
  started++;
  pthread_cond_broadcast (&change);
  while (!over)
    pthread_cond_wait (&change, &lock);
  pthread_mutex_unlock (&lock);
  return NULL;
}

static void
unruly_load (void)
{
  early = nbdkit_printf_intern ("%s %d", "early", 1);
}

static int
unruly_after_fork (void)
{
  size_t i;

  for (i = 0; i < sizeof threads / sizeof threads[0]; ++i) {
    errno = pthread_create (&threads[i], NULL, own_thread, NULL);
    if (errno != 0) {
      nbdkit_error ("pthread_create: %m");
      return -1;
    }
  }
  pthread_mutex_lock (&lock);
  while (started < sizeof threads / sizeof threads[0])
    pthread_cond_wait (&change, &lock);
  pthread_mutex_unlock (&lock);
  return 0;
}

static void
unruly_cleanup (void)
{
  size_t i;

  pthread_mutex_lock (&lock);
  over = 1;
  pthread_cond_broadcast (&change);
  pthread_mutex_unlock (&lock);
  for (i = 0; i < sizeof threads / sizeof threads[0]; ++i)
    pthread_join (threads[i], NULL);
  if (strcmp (early, "early 1") != 0)
    abort ();
}

static void *
unruly_open (int readonly)
{
  struct handle *handle = malloc (sizeof *handle);

  (void) readonly;
  if (handle != NULL)
    handle->name = nbdkit_printf_intern ("export '%s'", nbdkit_export_name ());
  return handle;
}

static void
unruly_close (void *handle)
{
  if (strncmp (((struct handle *) handle)->name, "export '", 8) != 0)
    abort ();
  free (handle);
}

static int64_t
unruly_get_size (void *handle)
{
  (void) handle;
  return BLOCKS * BLOCK;
}

/* A child that leaves, politely or at once, while the parent goes on. */
static int
leave (int politely)
{
  int status;
  pid_t child = fork ();

  if (child == 0) {
    nbdkit_error ("said by a child");
    if (politely)
      exit (3);
    _exit (3);
  }
  if (child == -1 || waitpid (child, &status, 0) != child) {
    nbdkit_error ("fork: %m");
    return -1;
  }
  return WIFEXITED (status) ? WEXITSTATUS (status) : -1;
}

static int
unruly_pread (void *h, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  struct handle *handle = h;
  char *text = buf;
  struct sockaddr_storage address;
  socklen_t length = sizeof address;

  (void) flags;
  memset (buf, 0, count);
  if (count < 512)
    return 0;
  switch (offset / BLOCK) {
  case FORK:
    snprintf (text, count, "children %d %d", leave (1), leave (0));
    return 0;
  case PEER:
    snprintf (text, count, "peer %d %d %d %d", nbdkit_peer_name ((struct sockaddr *) &address, &length),
              nbdkit_peer_pid () > 0, nbdkit_peer_uid () >= 0, nbdkit_peer_gid () >= 0);
    return 0;
  case INTERNED:
    snprintf (text, count, "%s, %s", handle->name, early);
    return 0;
  case SLEEP:
    nbdkit_error ("asleep");
    if (nbdkit_nanosleep (3600, 0) == -1)
      nbdkit_error ("woken: %m");
    nbdkit_set_error (ESHUTDOWN);
    return -1;
  default:
    nbdkit_error ("the last words");
    exit (7);
  }
}

static struct nbdkit_plugin plugin = {
  .name = "unruly",
  .load = unruly_load,
  .after_fork = unruly_after_fork,
  .cleanup = unruly_cleanup,
  .open = unruly_open,
  .close = unruly_close,
  .get_size = unruly_get_size,
  .pread = unruly_pread,
};

NBDKIT_REGISTER_PLUGIN (plugin)
