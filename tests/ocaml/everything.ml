(* Every callback. Says in the file log= what is called, with the arguments that matter. *)
open NBDKit

let log = ref stderr
let zero_fails = ref None
let say format = Printf.ksprintf (fun line -> output_string !log (line ^ "\n"); flush !log) format

let flag = function May_trim -> "may_trim" | FUA -> "fua" | Req_one -> "req_one" | Fast_zero -> "fast_zero"
let flags list = String.concat "," (List.map flag list)

let config key value =
  match key with
  | "log" -> log := open_out_gen [ Open_append; Open_creat ] 0o644 (absolute_path value)
  | "zero" -> zero_fails := Some (if value = "EOPNOTSUPP" then Unix.EOPNOTSUPP else Unix.ENOSPC)
  | _ -> failwith ("unknown parameter " ^ key)

let config_complete () =
  if !log == stderr then failwith "log= is missing";
  debug "hello from %s and %d" "OCaml" 42;
  assert (parse_size "1K" = 1024L);
  assert (parse_bool "yes" && not (parse_bool "off"));
  (match parse_size "many" with exception Invalid_argument _ -> () | _ -> assert false);
  (match parse_probability "p" "25%" with exception Failure _ -> say "too old" | p -> assert (p = 0.25));
  (match parse_delay "d" "250ms" with exception Failure _ -> () | d -> assert (d = (0, 250_000_000)));
  (match peer_pid () with exception Invalid_argument _ -> () | _ -> assert false);
  assert (realpath "/usr/../usr" = "/usr");
  assert (read_password "secret" = "secret");
  assert (stdio_safe ());
  assert (api_version () = 2 && version () <> "")

let open_connection readonly =
  let name = export_name () in
  say "open %b %s %b" readonly name (is_tls ());
  assert (peer_uid () >= 0L && peer_gid () >= 0L && peer_pid () > 0L);
  nanosleep 0 1000;
  if name = "forbidden" then begin
    set_error Unix.EPERM;
    failwith "not for you"
  end;
  name

let size = 1_048_576

let extents _ count offset list =
  say "extents %Ld %Ld %s" count offset (flags list);
  let extent offset length is_hole is_zero = { offset; length; is_hole; is_zero } in
  [ extent 0L 4096L false false; extent 4096L 8192L true true; extent 12288L 4096L false true;
    extent 16384L (Int64.of_int (size - 16384)) false false ]

let zero _ count offset list =
  say "zero %Ld %Ld %s" count offset (flags list);
  Option.iter (fun error -> set_error error; failwith "zero fails") !zero_fails

let () =
  register_plugin
    {
      default_callbacks with
      name = "everything";
      longname = "all there is";
      version = "1.2";
      description = "for tests";
      config_help = "log=FILE";
      magic_config_key = "log";
      load = Some (fun () -> debug "load");
      get_ready = Some (fun () -> say "get_ready");
      after_fork = Some (fun () -> say "after_fork");
      cleanup = Some (fun () -> say "cleanup");
      unload = Some (fun () -> say "unload");
      config = Some config;
      config_complete = Some config_complete;
      thread_model = Some (fun () -> THREAD_MODEL_SERIALIZE_REQUESTS);
      preconnect = Some (fun readonly -> say "preconnect %b" readonly);
      open_connection = Some open_connection;
      close = Some (fun name -> say "close %s" name);
      get_size = Some (fun _ -> Int64.of_int size);
      block_size = Some (fun _ -> (512, 4096, 0xffffffffL));
      can_cache = Some (fun _ -> CacheNop);
      can_extents = Some (fun _ -> true);
      can_fast_zero = Some (fun _ -> true);
      can_flush = Some (fun _ -> true);
      can_fua = Some (fun _ -> FuaNative);
      can_multi_conn = Some (fun _ -> true);
      can_trim = Some (fun _ -> true);
      can_write = Some (fun name -> name <> "readonly");
      can_zero = Some (fun _ -> true);
      is_rotational = Some (fun name -> name = "described");
      pread = Some (string_pread (fun _ count _ _ -> String.make (Int32.to_int count) 'r'));
      pwrite = Some (string_pwrite (fun _ data offset list -> say "pwrite %d %Ld %s" (String.length data) offset (flags list)));
      flush = Some (fun _ list -> say "flush %s" (flags list));
      trim = Some (fun _ count offset list -> say "trim %Ld %Ld %s" count offset (flags list));
      zero = Some zero;
      extents = Some extents;
      cache = Some (fun _ count offset _ -> say "cache %Ld %Ld" count offset);
      dump_plugin = Some (fun () -> print_endline "everything_ocaml=yes");
      list_exports =
        Some
          (fun readonly is_tls ->
            say "list_exports %b %b" readonly is_tls;
            [ { name = "plain"; description = None }; { name = "described"; description = Some "with words" } ]);
      default_export = Some (fun _ _ -> "plain");
      export_description = Some (fun name -> if name = "described" then "with words" else name);
    }
