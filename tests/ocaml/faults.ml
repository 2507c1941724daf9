(* Exceptions, chosen by the block that is read. *)
exception Mine of int * string

let () = Printexc.register_printer (function Mine (n, text) -> Some (Printf.sprintf "mine: %d %s" n text) | _ -> None)
let kept = ref None
let rec deep n = if n = 0 then 0 else 1 + deep (n - 1)
let rec forever n = 1 + forever (n + 1)

let pread _ buf offset _ =
  if offset <> Int64.of_int (14 * 512) then Bigarray.Array1.fill buf 'a';
  match Int64.to_int offset / 512 with
  | 0 -> kept := Some buf
  | 1 -> failwith "plain"
  | 2 -> raise Not_found
  | 3 -> raise (Mine (5, "words"))
  | 4 -> ignore (Sys.opaque_identity [| 1 |]).(Sys.opaque_identity 7)
  | 5 -> NBDKit.set_error Unix.ENOSPC; failwith "no room"
  | 6 -> NBDKit.set_error (Unix.EUNKNOWNERR 108); failwith "over"
  | 7 -> NBDKit.set_error Unix.ENOMEM
  | 8 -> assert false
  | 9 -> NBDKit.string_pread (fun _ _ _ _ -> "short") () buf offset []
  | 10 -> (match !kept with Some old -> if Bigarray.Array1.dim old <> 0 then failwith "still there" | None -> failwith "lost")
  | 11 -> (match !kept with Some old -> Bigarray.Array1.set old 0 'x' | None -> ())
  | 12 -> ignore (deep 100_000)
  | 13 -> ignore (NBDKit.parse_size "many")
  | 14 -> ()
  | _ -> ignore (Sys.opaque_identity forever)

let wrong = ref ""
let plugin =
  {
    NBDKit.default_callbacks with
    name = "faults";
    config = Some (fun _ value -> wrong := value);
    thread_model = Some (fun () -> if !wrong = "thread_model" then failwith "no model" else NBDKit.THREAD_MODEL_PARALLEL);
    open_connection = Some (fun _ -> if !wrong = "open" then failwith "not today");
    get_size = Some (fun () -> if !wrong = "size" then -1L else 1048576L);
    block_size = Some (fun () -> if !wrong = "block" then (512, 4096, -1L) else (0, 0, 0L));
    pread = Some pread;
  }

let () = NBDKit.register_plugin plugin
let () = if Sys.getenv_opt "TWICE" <> None then NBDKit.register_plugin plugin
