(* A RAM disk by labels, whose first bytes tell what client there is and what goes wrong. *)

let data = Bytes.make 1048576 '\000'

let refused f =
  match f () with () -> "allowed" | exception Invalid_argument text -> text

let open_connection _ =
  let client =
    match NBDKit.peer_name () with
    | Unix.ADDR_UNIX path -> Printf.sprintf "unix '%s'" path
    | Unix.ADDR_INET (_, port) -> Printf.sprintf "port %b" (port > 0)
  in
  let buf = Bigarray.Array1.create Bigarray.char Bigarray.c_layout 4 in
  NBDKit.blit_string_to_buf "xabcd" 1 buf 0 4;
  NBDKit.blit_bytes_to_buf (Bytes.of_string "12") 0 buf 1 2;
  let copy = Bytes.make 4 '-' in
  NBDKit.blit_buf_to_bytes buf 1 copy 0 3;
  let wrong =
    [
      (fun () -> NBDKit.blit_string_to_buf "abc" 1 buf 0 3);
      (fun () -> NBDKit.blit_bytes_to_buf copy 0 buf 3 2);
      (fun () -> NBDKit.blit_buf_to_bytes buf (-1) copy 0 1);
      (fun () -> NBDKit.blit_buf_to_bytes buf 0 copy 0 max_int);
    ]
  in
  let lines = client :: Bytes.to_string copy :: List.map refused wrong in
  let text = String.concat "\n" lines in
  Bytes.blit_string text 0 data 0 (String.length text)

let get_size () = Int64.of_int (Bytes.length data)
let at offset = Int64.to_int offset
let pread () buf offset _ = NBDKit.blit_bytes_to_buf data (at offset) buf 0 (NBDKit.buf_len buf)
let pwrite () buf offset _ = NBDKit.blit_buf_to_bytes buf 0 data (at offset) (NBDKit.buf_len buf)

let () =
  NBDKit.register_plugin ~name:"labelled" ~version:"1.0"
    ~thread_model:(fun () -> NBDKit.THREAD_MODEL_PARALLEL)
    ~open_connection ~get_size ~pread ~pwrite ()
