/* What the server calls: plugin_init, which starts OCaml and so lets the plugin register itself, and a C function for
 * each callback.
 *
 * Each callback goes into the runtime, calls the plugin's function and comes out. A function whose name begins with
 * `in_` is in the runtime and may allocate; its values are roots. An exception becomes an error message and -1.
 */

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CAML_NAME_SPACE
#include <caml/alloc.h>
#include <caml/bigarray.h>
#include <caml/callback.h>
#include <caml/fail.h>
#include <caml/memory.h>
#include <caml/mlvalues.h>
#include <caml/printexc.h>
#include <caml/version.h>

#include <nbdkit-plugin.h>

#include "plugin.h"
#include "runtime.h"

struct nbdkit_plugin *plugin_init (void);

__thread int callback_errno;

static struct nbdkit_plugin plugin;

/* The plugin's functions, by their names in NBDKit.ml. Each is a root once it is there, and 0 until then. */
#define FUNCTIONS(F)                                                                                            \
  F (load) F (get_ready) F (after_fork) F (cleanup) F (unload) F (config) F (config_complete) F (thread_model)  \
  F (preconnect) F (open_connection) F (close) F (get_size) F (block_size) F (can_cache) F (can_extents)        \
  F (can_fast_zero) F (can_flush) F (can_fua) F (can_multi_conn) F (can_trim) F (can_write) F (can_zero)        \
  F (is_rotational) F (pread) F (pwrite) F (flush) F (trim) F (zero) F (extents) F (cache) F (dump_plugin)      \
  F (list_exports) F (default_export) F (export_description) F (describe)

#define DECLARE(name) static value fn_ ## name;
FUNCTIONS (DECLARE)

/* A handle is a box, since C needs an address that stays and the collector moves values. */
struct handle {
  value contents;
};

/*----- exceptions -----*/

/* Reports an exception as the error of a callback. */
static void
in_report (const char *method, value exception)
{
  CAMLparam1 (exception);
  CAMLlocal1 (text);
  char *plain = NULL;

  exception = Extract_exception (exception);
  text = fn_describe ? caml_callback_exn (fn_describe, exception) : Val_unit;
  if (!fn_describe || Is_exception_result (text)) {
    text = Val_unit;
    plain = caml_format_exception (exception);
  }
  /* zero that cannot do it this way is no error: the server writes zeroes. */
  if (strcmp (method, "zero") == 0 && callback_errno == EOPNOTSUPP)
    nbdkit_debug ("%s: %s", method, plain ? plain : String_val (text));
  else
    nbdkit_error ("%s: %s", method, plain ? plain : String_val (text));
  caml_stat_free (plain);
  CAMLreturn0;
}

/* Calls a function of the plugin. False if it raised an exception, which is reported. */
static bool
in_call (const char *method, value function, int count, value arguments[], value *result)
{
  value outcome;

  callback_errno = 0;
  outcome = caml_callbackN_exn (function, count, arguments);
  if (Is_exception_result (outcome)) {
    /* The result may be a root, and an exception result is no value for the collector to see. */
    *result = Val_unit;
    in_report (method, outcome);
    return false;
  }
  *result = outcome;
  return true;
}

/*----- life of the plugin -----*/

static int
in_step (const char *method, value function)
{
  CAMLparam0 ();
  CAMLlocal1 (result);
  CAMLlocalN (arguments, 1);

  arguments[0] = Val_unit;
  CAMLreturnT (int, in_call (method, function, 1, arguments, &result) ? 0 : -1);
}

#define STEP(name)                              \
  static int                                    \
  cb_ ## name (void)                            \
  {                                             \
    int answer;                                 \
                                                \
    enter_runtime ();                           \
    answer = in_step (#name, fn_ ## name);      \
    leave_runtime ();                           \
    return answer;                              \
  }
STEP (get_ready)
STEP (after_fork)
STEP (config_complete)

#define SILENT_STEP(name)                       \
  static void                                   \
  cb_ ## name (void)                            \
  {                                             \
    enter_runtime ();                           \
    in_step (#name, fn_ ## name);               \
    leave_runtime ();                           \
  }
SILENT_STEP (load)
SILENT_STEP (cleanup)

/* The server prints through C's buffer, the plugin through OCaml's, which NBDKit.ml flushes. */
static void
cb_dump_plugin (void)
{
  printf ("ocaml_version_major=%d\n", OCAML_VERSION_MAJOR);
  printf ("ocaml_version_minor=%d\n", OCAML_VERSION_MINOR);
  printf ("ocaml_version=%s\n", OCAML_VERSION_STRING);
  fflush (stdout);
  if (!fn_dump_plugin)
    return;
  enter_runtime ();
  in_step ("dump_plugin", fn_dump_plugin);
  leave_runtime ();
}

/* The end of OCaml: what its at_exit has kept is run, and threads of its own end. */
static void
cb_unload (void)
{
  const value *at_exit;

  enter_runtime ();
  if (fn_unload)
    in_step ("unload", fn_unload);
  at_exit = caml_named_value ("Pervasives.do_at_exit");
  if (at_exit)
    in_step ("unload", *at_exit);
  stop_runtime ();
  leave_runtime ();
}

static int
in_config (const char *key, const char *text)
{
  CAMLparam0 ();
  CAMLlocal1 (result);
  CAMLlocalN (arguments, 2);

  arguments[0] = caml_copy_string (key);
  arguments[1] = caml_copy_string (text);
  CAMLreturnT (int, in_call ("config", fn_config, 2, arguments, &result) ? 0 : -1);
}

static int
cb_config (const char *key, const char *text)
{
  int answer;

  enter_runtime ();
  answer = in_config (key, text);
  leave_runtime ();
  return answer;
}

/* A question whose answer is a constant constructor or a boolean; in their order they are the numbers of C. */
static int
in_ask (const char *method, value function, value about)
{
  CAMLparam1 (about);
  CAMLlocal1 (result);
  CAMLlocalN (arguments, 1);

  arguments[0] = about;
  CAMLreturnT (int, in_call (method, function, 1, arguments, &result) ? Int_val (result) : -1);
}

static int
cb_thread_model (void)
{
  int answer;

  enter_runtime ();
  answer = in_ask ("thread_model", fn_thread_model, Val_unit);
  leave_runtime ();
  return answer;
}

static int
cb_preconnect (int readonly)
{
  int answer;

  enter_runtime ();
  answer = in_ask ("preconnect", fn_preconnect, Val_bool (readonly)) == -1 ? -1 : 0;
  leave_runtime ();
  return answer;
}

/*----- exports -----*/

static int
in_list_exports (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  CAMLparam0 ();
  CAMLlocal3 (list, export, description);
  CAMLlocalN (arguments, 2);

  arguments[0] = Val_bool (readonly);
  arguments[1] = Val_bool (is_tls);
  if (!in_call ("list_exports", fn_list_exports, 2, arguments, &list))
    CAMLreturnT (int, -1);
  for (; Is_block (list); list = Field (list, 1)) {
    export = Field (list, 0);
    description = Field (export, 1);
    if (nbdkit_add_export (exports, String_val (Field (export, 0)),
                           Is_block (description) ? String_val (Field (description, 0)) : NULL) == -1)
      CAMLreturnT (int, -1);
  }
  CAMLreturnT (int, 0);
}

static int
cb_list_exports (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  int answer;

  enter_runtime ();
  answer = in_list_exports (readonly, is_tls, exports);
  leave_runtime ();
  return answer;
}

static const char *
in_default_export (int readonly, int is_tls)
{
  CAMLparam0 ();
  CAMLlocal1 (name);
  CAMLlocalN (arguments, 2);

  arguments[0] = Val_bool (readonly);
  arguments[1] = Val_bool (is_tls);
  if (!in_call ("default_export", fn_default_export, 2, arguments, &name))
    CAMLreturnT (const char *, NULL);
  CAMLreturnT (const char *, nbdkit_strdup_intern (String_val (name)));
}

static const char *
cb_default_export (int readonly, int is_tls)
{
  const char *name;

  enter_runtime ();
  name = in_default_export (readonly, is_tls);
  leave_runtime ();
  return name;
}

/*----- handles -----*/

static struct handle *
in_open (int readonly)
{
  CAMLparam0 ();
  CAMLlocal1 (contents);
  CAMLlocalN (arguments, 1);
  struct handle *handle;

  arguments[0] = Val_bool (readonly);
  if (!in_call ("open", fn_open_connection, 1, arguments, &contents))
    CAMLreturnT (struct handle *, NULL);
  handle = malloc (sizeof *handle);
  if (handle == NULL) {
    nbdkit_error ("open: no memory for a handle");
    CAMLreturnT (struct handle *, NULL);
  }
  handle->contents = contents;
  caml_register_generational_global_root (&handle->contents);
  CAMLreturnT (struct handle *, handle);
}

static void *
cb_open_connection (int readonly)
{
  struct handle *handle;

  enter_runtime ();
  handle = in_open (readonly);
  leave_runtime ();
  return handle;
}

static void
cb_close (void *data)
{
  struct handle *handle = data;

  enter_runtime ();
  if (fn_close)
    in_ask ("close", fn_close, handle->contents);
  caml_remove_generational_global_root (&handle->contents);
  leave_runtime ();
  free (handle);
}

#define QUESTION(name)                                                                  \
  static int                                                                            \
  cb_ ## name (void *data)                                                              \
  {                                                                                     \
    int answer;                                                                         \
                                                                                        \
    enter_runtime ();                                                                   \
    answer = in_ask (#name, fn_ ## name, ((struct handle *) data)->contents);           \
    leave_runtime ();                                                                   \
    return answer;                                                                      \
  }
QUESTION (can_cache)
QUESTION (can_extents)
QUESTION (can_fast_zero)
QUESTION (can_flush)
QUESTION (can_fua)
QUESTION (can_multi_conn)
QUESTION (can_trim)
QUESTION (can_write)
QUESTION (can_zero)
QUESTION (is_rotational)

static int64_t
in_get_size (struct handle *handle)
{
  CAMLparam0 ();
  CAMLlocal1 (result);
  CAMLlocalN (arguments, 1);
  int64_t size;

  arguments[0] = handle->contents;
  if (!in_call ("get_size", fn_get_size, 1, arguments, &result))
    CAMLreturnT (int64_t, -1);
  size = Int64_val (result);
  if (size < 0) {
    nbdkit_error ("get_size: the size is negative: %lld", (long long) size);
    size = -1;
  }
  CAMLreturnT (int64_t, size);
}

static int64_t
cb_get_size (void *data)
{
  int64_t size;

  enter_runtime ();
  size = in_get_size (data);
  leave_runtime ();
  return size;
}

static bool
fits (const char *what, int64_t size, uint32_t *place)
{
  if (size < 0 || size > UINT32_MAX) {
    nbdkit_error ("block_size: the %s must be from 0 to 2^32-1, not %lld", what, (long long) size);
    return false;
  }
  *place = size;
  return true;
}

static int
in_block_size (struct handle *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  CAMLparam0 ();
  CAMLlocal1 (result);
  CAMLlocalN (arguments, 1);
  bool is_right;

  arguments[0] = handle->contents;
  if (!in_call ("block_size", fn_block_size, 1, arguments, &result))
    CAMLreturnT (int, -1);
  is_right = fits ("minimum", Long_val (Field (result, 0)), minimum)
    && fits ("preferred size", Long_val (Field (result, 1)), preferred)
    && fits ("maximum", Int64_val (Field (result, 2)), maximum);
  CAMLreturnT (int, is_right ? 0 : -1);
}

static int
cb_block_size (void *data, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  int answer;

  enter_runtime ();
  answer = in_block_size (data, minimum, preferred, maximum);
  leave_runtime ();
  return answer;
}

static const char *
in_export_description (struct handle *handle)
{
  CAMLparam0 ();
  CAMLlocal1 (text);
  CAMLlocalN (arguments, 1);

  arguments[0] = handle->contents;
  if (!in_call ("export_description", fn_export_description, 1, arguments, &text))
    CAMLreturnT (const char *, NULL);
  CAMLreturnT (const char *, nbdkit_strdup_intern (String_val (text)));
}

static const char *
cb_export_description (void *data)
{
  const char *text;

  enter_runtime ();
  text = in_export_description (data);
  leave_runtime ();
  return text;
}

/*----- requests -----*/

/* Flags as a list, in the order of their constructors. */
static value
in_flags (uint32_t flags)
{
  CAMLparam0 ();
  CAMLlocal2 (list, cell);
  static const uint32_t bits[] =
    { NBDKIT_FLAG_MAY_TRIM, NBDKIT_FLAG_FUA, NBDKIT_FLAG_REQ_ONE, NBDKIT_FLAG_FAST_ZERO };
  int i;

  list = Val_emptylist;
  for (i = 3; i >= 0; i--) {
    if (flags & bits[i]) {
      cell = caml_alloc (2, 0);
      Store_field (cell, 0, Val_int (i));
      Store_field (cell, 1, list);
      list = cell;
    }
  }
  CAMLreturn (list);
}

/* pread and pwrite: the server's memory as an array that is empty afterwards, for the plugin may have kept it. */
static int
in_data (const char *method, value function, struct handle *handle, void *data, uint32_t count, uint64_t offset,
         uint32_t flags)
{
  CAMLparam0 ();
  CAMLlocal1 (result);
  CAMLlocalN (arguments, 4);
  intnat length = count;
  bool is_done;

  arguments[0] = handle->contents;
  arguments[1] = caml_ba_alloc (CAML_BA_CHAR | CAML_BA_C_LAYOUT | CAML_BA_EXTERNAL, 1, data, &length);
  arguments[2] = caml_copy_int64 (offset);
  arguments[3] = in_flags (flags);
  is_done = in_call (method, function, 4, arguments, &result);
  Caml_ba_array_val (arguments[1])->dim[0] = 0;
  CAMLreturnT (int, is_done ? 0 : -1);
}

static int
cb_pread (void *handle, void *data, uint32_t count, uint64_t offset, uint32_t flags)
{
  int answer;

  /* It has held what others read and wrote, and a plugin need not fill it. */
  memset (data, 0, count);
  enter_runtime ();
  answer = in_data ("pread", fn_pread, handle, data, count, offset, flags);
  leave_runtime ();
  return answer;
}

static int
cb_pwrite (void *handle, const void *data, uint32_t count, uint64_t offset, uint32_t flags)
{
  int answer;

  enter_runtime ();
  answer = in_data ("pwrite", fn_pwrite, handle, (void *) data, count, offset, flags);
  leave_runtime ();
  return answer;
}

static int
in_flush (struct handle *handle, uint32_t flags)
{
  CAMLparam0 ();
  CAMLlocal1 (result);
  CAMLlocalN (arguments, 2);

  arguments[0] = handle->contents;
  arguments[1] = in_flags (flags);
  CAMLreturnT (int, in_call ("flush", fn_flush, 2, arguments, &result) ? 0 : -1);
}

static int
cb_flush (void *handle, uint32_t flags)
{
  int answer;

  enter_runtime ();
  answer = in_flush (handle, flags);
  leave_runtime ();
  return answer;
}

/* Whatever is about a range. */
static bool
in_range (const char *method, value function, struct handle *handle, uint32_t count, uint64_t offset, uint32_t flags,
          value *result)
{
  CAMLparam0 ();
  CAMLlocalN (arguments, 4);

  arguments[0] = handle->contents;
  arguments[1] = caml_copy_int64 (count);
  arguments[2] = caml_copy_int64 (offset);
  arguments[3] = in_flags (flags);
  CAMLreturnT (bool, in_call (method, function, 4, arguments, result));
}

#define RANGE(name)                                                                             \
  static int                                                                                    \
  cb_ ## name (void *handle, uint32_t count, uint64_t offset, uint32_t flags)                   \
  {                                                                                             \
    value result;                                                                               \
    bool is_done;                                                                               \
                                                                                                \
    enter_runtime ();                                                                           \
    is_done = in_range (#name, fn_ ## name, handle, count, offset, flags, &result);             \
    leave_runtime ();                                                                           \
    return is_done ? 0 : -1;                                                                    \
  }
RANGE (trim)
RANGE (zero)
RANGE (cache)

static int
in_extents (struct handle *handle, uint32_t count, uint64_t offset, uint32_t flags, struct nbdkit_extents *extents)
{
  CAMLparam0 ();
  CAMLlocal2 (list, extent);

  if (!in_range ("extents", fn_extents, handle, count, offset, flags, &list))
    CAMLreturnT (int, -1);
  for (; Is_block (list); list = Field (list, 1)) {
    uint32_t type;

    extent = Field (list, 0);
    type = (Bool_val (Field (extent, 2)) ? NBDKIT_EXTENT_HOLE : 0)
      | (Bool_val (Field (extent, 3)) ? NBDKIT_EXTENT_ZERO : 0);
    if (nbdkit_add_extent (extents, Int64_val (Field (extent, 0)), Int64_val (Field (extent, 1)), type) == -1)
      CAMLreturnT (int, -1);
  }
  CAMLreturnT (int, 0);
}

static int
cb_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags, struct nbdkit_extents *extents)
{
  int answer;

  enter_runtime ();
  answer = in_extents (handle, count, offset, flags, extents);
  leave_runtime ();
  return answer;
}

/*----- registration -----*/

/* A text of the plugin, which stays as long as the program. */
CAMLprim value
nbdkitocaml_set_text (value field, value text)
{
  const char *name = String_val (field);
  char *copy = strdup (String_val (text));

  if (copy == NULL)
    caml_raise_out_of_memory ();
#define TEXT(field)                             \
  if (strcmp (name, #field) == 0)               \
    plugin.field = copy;
  TEXT (name) TEXT (longname) TEXT (version) TEXT (description) TEXT (config_help) TEXT (magic_config_key)
  return Val_unit;
}

CAMLprim value
nbdkitocaml_set_callback (value field, value function)
{
  CAMLparam2 (field, function);
  const char *name = String_val (field);

#define KEEP(field)                                             \
  if (strcmp (name, #field) == 0) {                             \
    fn_ ## field = function;                                    \
    caml_register_generational_global_root (&fn_ ## field);     \
    CAMLreturn (Val_unit);                                      \
  }
  FUNCTIONS (KEEP)
  CAMLreturn (Val_unit);
}

/* A callback is the server's to call if the plugin has the function. */
static void
fill_table (void)
{
  plugin._struct_size = sizeof plugin;
  plugin._api_version = NBDKIT_API_VERSION;
  plugin._thread_model = NBDKIT_THREAD_MODEL_PARALLEL;
  plugin.unload = cb_unload;
  plugin.open = cb_open_connection;
  plugin.close = cb_close;
  plugin.dump_plugin = cb_dump_plugin;
#define OFFER(name)                             \
  if (fn_ ## name)                              \
    plugin.name = cb_ ## name;
  OFFER (load) OFFER (get_ready) OFFER (after_fork) OFFER (cleanup) OFFER (config) OFFER (config_complete)
  OFFER (thread_model) OFFER (preconnect) OFFER (get_size) OFFER (block_size) OFFER (can_cache) OFFER (can_extents)
  OFFER (can_fast_zero) OFFER (can_flush) OFFER (can_fua) OFFER (can_multi_conn) OFFER (can_trim) OFFER (can_write)
  OFFER (can_zero) OFFER (is_rotational) OFFER (pread) OFFER (pwrite) OFFER (flush) OFFER (trim) OFFER (zero)
  OFFER (extents) OFFER (cache) OFFER (list_exports) OFFER (default_export)
  OFFER (export_description)
}

struct nbdkit_plugin *
plugin_init (void)
{
  static char name[] = "nbdkit";
  static char *arguments[] = { name, NULL };
  bool is_usable;
  value result;

  before_startup ();
  result = caml_startup_exn (arguments);
  if (Is_exception_result (result)) {
    in_report ("plugin_init", result);
    return NULL;
  }
  is_usable = after_startup ();
  if (!is_usable)
    return NULL;
  if (!fn_describe) {
    nbdkit_error ("the plugin has not called NBDKit.register_plugin");
    return NULL;
  }
  fill_table ();
  return &plugin;
}
