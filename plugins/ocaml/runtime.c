/* Who may be in the OCaml runtime, and when.
 *
 * The server calls from threads of its own that the runtime does not know. If the plugin is linked with OCaml's library
 * threads, each is registered when it comes for the first time and unregistered when it ends, and the runtime's own lock
 * is taken, which it gives up in blocking sections. Without that library nobody but us knows of threads: then a mutex
 * lets one in at a time, which is all that OCaml 4 needs. In OCaml 5 a thread must be registered.
 */

#define _GNU_SOURCE

#include <dlfcn.h>
#include <pthread.h>

#include <caml/mlvalues.h>
#include <caml/threads.h>
#include <caml/version.h>

#include <nbdkit-plugin.h>

#include "runtime.h"

/* In the library threads, which need not be there. */
extern int caml_c_thread_register (void) __attribute__ ((weak));
extern int caml_c_thread_unregister (void) __attribute__ ((weak));

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static bool is_stopped;

/* Of this thread: the runtime knows it; it is inside; it went in to fork. */
static __thread bool is_known;
static __thread bool is_inside;
static __thread bool is_forking;

static pthread_key_t ending;

static bool
has_threads (void)
{
  return caml_c_thread_register != NULL;
}

static void
thread_ends (void *unused)
{
  (void) unused;
  if (!is_stopped)
    caml_c_thread_unregister ();
}

void
enter_runtime (void)
{
  if (has_threads ()) {
    if (!is_known) {
      /* The thread that started the runtime is known to it already, and lasts. */
      if (caml_c_thread_register ())
        pthread_setspecific (ending, &ending);
      is_known = true;
    }
    caml_acquire_runtime_system ();
  }
  else
    pthread_mutex_lock (&mutex);
  is_inside = true;
}

void
leave_runtime (void)
{
  is_inside = false;
  if (has_threads ())
    caml_release_runtime_system ();
  else
    pthread_mutex_unlock (&mutex);
}

void
begin_blocking (void)
{
  if (has_threads ())
    caml_release_runtime_system ();
}

void
end_blocking (void)
{
  if (has_threads ())
    caml_acquire_runtime_system ();
}

void
stop_runtime (void)
{
  is_stopped = true;
}

/* In the child of a fork the runtime takes it that the thread which forked was inside. So the server, which was not,
 * goes in for as long as it takes. A thread that the runtime does not know forks to run another program.
 */
static void
before_fork (void)
{
  if (is_known && !is_inside) {
    enter_runtime ();
    is_forking = true;
  }
}

static void
after_fork (void)
{
  if (is_forking) {
    is_forking = false;
    leave_runtime ();
  }
}

void
before_startup (void)
{
  Dl_info info;

  /* Threads may end, and the runtime's own may run, after the server has let go of the plugin. */
  if (dladdr (&mutex, &info) != 0)
    dlopen (info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);

  /* Before the runtime makes its own key: at the end of a thread keys are cleared in their order, and the runtime's must
   * be there when the thread is unregistered.
   */
  pthread_key_create (&ending, thread_ends);
}

bool
after_startup (void)
{
#if OCAML_VERSION >= 50000
  if (!has_threads ()) {
    nbdkit_error ("plugins in OCaml 5 must be linked with threads: add -I +unix -I +threads unix.cmxa threads.cmxa");
    return false;
  }
#endif
  if (has_threads ()) {
    is_known = true;
    pthread_atfork (before_fork, after_fork, after_fork);
    caml_release_runtime_system ();
  }
  return true;
}
