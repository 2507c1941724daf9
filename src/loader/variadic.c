/* The printf-like functions of the C interface. Rust cannot define functions with a variable number of arguments, so
 * these format the text and hand it over. errno is as the caller left it both for %m and on return.
 */

#define _GNU_SOURCE

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* Defined in exports/messages.rs and exports/strings.rs. */
extern void nbdkitrs_error (const char *text);
extern void nbdkitrs_debug (const char *text);
extern int nbdkitrs_is_verbose (void);
extern const char *nbdkitrs_intern (const char *text);

void nbdkit_error (const char *format, ...);
void nbdkit_verror (const char *format, va_list args);
void nbdkit_debug (const char *format, ...);
void nbdkit_vdebug (const char *format, va_list args);
const char *nbdkit_printf_intern (const char *format, ...);
const char *nbdkit_vprintf_intern (const char *format, va_list args);

/* The text, or NULL: then there is no memory, and the bare format is better than nothing. */
static char *
format_text (const char *format, va_list args)
{
  char *text = NULL;

  if (vasprintf (&text, format, args) == -1)
    return NULL;
  return text;
}

void
nbdkit_verror (const char *format, va_list args)
{
  int saved = errno;
  char *text = format_text (format, args);

  nbdkitrs_error (text ? text : format);
  free (text);
  errno = saved;
}

void
nbdkit_error (const char *format, ...)
{
  va_list args;

  va_start (args, format);
  nbdkit_verror (format, args);
  va_end (args);
}

void
nbdkit_vdebug (const char *format, va_list args)
{
  int saved = errno;
  char *text;

  if (!nbdkitrs_is_verbose ())
    return;
  text = format_text (format, args);
  nbdkitrs_debug (text ? text : format);
  free (text);
  errno = saved;
}

void
nbdkit_debug (const char *format, ...)
{
  va_list args;

  va_start (args, format);
  nbdkit_vdebug (format, args);
  va_end (args);
}

const char *
nbdkit_vprintf_intern (const char *format, va_list args)
{
  char *text = format_text (format, args);
  const char *interned;

  if (text == NULL) {
    nbdkit_error ("nbdkit_printf_intern: %m");
    return NULL;
  }
  interned = nbdkitrs_intern (text);
  free (text);
  return interned;
}

const char *
nbdkit_printf_intern (const char *format, ...)
{
  const char *interned;
  va_list args;

  va_start (args, format);
  interned = nbdkit_vprintf_intern (format, args);
  va_end (args);
  return interned;
}
