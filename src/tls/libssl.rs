//! OpenSSL's libraries, opened when TLS is first asked for.
//!
//! Linked in the usual way they would be loaded by every start: a quarter of its time and half a megabyte of memory that
//! is not shared, though most servers encrypt nothing. So each function of theirs that the program uses is defined here,
//! as a jump through a table, which is filled when the first credentials are made. The linker then finds that it does
//! not need the libraries. A function that is missing in the list below is found in them all the same: then the
//! program is linked as usual, and the test that looks for the libraries in a server without TLS fails.
//!
//! The names are hidden: what others in the process see, a plugin with OpenSSL say, are the libraries' own.

#![allow(unsafe_code)]

use std::{
    arch::global_asm,
    ffi::c_void,
    ptr::null_mut,
    sync::atomic::{AtomicPtr, Ordering},
};

use anyhow::Context as _;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// The library that brings the other with it.
const LIBRARY: &str = "libssl.so.3";

/// Defines functions that jump to where the table says.
macro_rules! functions {
    ($($name:ident)*) => {
        /// Where a function is in the table.
        #[allow(non_camel_case_types)]
        enum Slot { $($name),* }

        const NAMES: &[&str] = &[$(stringify!($name)),*];

        /// The functions' addresses.
        static TABLE: [AtomicPtr<c_void>; NAMES.len()] =
            [const { AtomicPtr::new(null_mut()) }; NAMES.len()];

        $(global_asm!(
            concat!(".globl ", stringify!($name)),
            concat!(".hidden ", stringify!($name)),
            concat!(".type ", stringify!($name), ", @function"),
            concat!(stringify!($name), ":"),
            "jmp *{table}+{at}(%rip)",
            table = sym TABLE,
            at = const Slot::$name as usize * size_of::<AtomicPtr<c_void>>(),
            options(att_syntax)
        );)*
    };
}

functions! {
    ASN1_TIME_diff ASN1_TIME_free ASN1_TIME_print BIO_clear_flags BIO_ctrl BIO_free_all BIO_get_data
    BIO_meth_free BIO_meth_new BIO_meth_set_create BIO_meth_set_ctrl BIO_meth_set_destroy BIO_meth_set_puts
    BIO_meth_set_read BIO_meth_set_write BIO_new BIO_new_mem_buf BIO_s_mem BIO_set_data BIO_set_flags
    BIO_set_init CRYPTO_get_ex_new_index ERR_get_error_all ERR_lib_error_string ERR_reason_error_string
    OPENSSL_init_ssl PEM_read_bio_X509 SSL_CIPHER_get_name SSL_CTX_add_client_CA SSL_CTX_check_private_key
    SSL_CTX_ctrl SSL_CTX_free SSL_CTX_get0_certificate SSL_CTX_get_ex_data SSL_CTX_new
    SSL_CTX_set_cert_store SSL_CTX_set_cipher_list SSL_CTX_set_ciphersuites SSL_CTX_set_ex_data
    SSL_CTX_set_keylog_callback SSL_CTX_set_num_tickets SSL_CTX_set_options SSL_CTX_set_psk_server_callback SSL_CTX_set_verify
    SSL_CTX_up_ref SSL_CTX_use_PrivateKey_file SSL_CTX_use_certificate_chain_file SSL_accept SSL_free
    SSL_get1_peer_certificate SSL_get_SSL_CTX SSL_get_current_cipher SSL_get_error SSL_get_ex_data SSL_get_rbio
    SSL_get_verify_result SSL_get_version SSL_is_init_finished SSL_new SSL_pending SSL_read_ex SSL_set_bio SSL_set_ex_data
    SSL_shutdown SSL_state_string_long SSL_write_ex TLS_server_method X509_LOOKUP_file X509_STORE_add_cert X509_STORE_add_lookup
    X509_STORE_free X509_STORE_new X509_STORE_set_flags X509_free X509_get_issuer_name X509_get_subject_name
    X509_getm_notAfter X509_getm_notBefore X509_gmtime_adj X509_load_crl_file X509_verify_cert_error_string
    i2d_X509_NAME
    SSL_CTX_set_default_verify_paths SSL_CTX_set_psk_client_callback SSL_connect SSL_ctrl SSL_get0_param TLS_client_method
    X509_VERIFY_PARAM_set1_host X509_VERIFY_PARAM_set1_ip X509_VERIFY_PARAM_set_hostflags
}

/// Opens the libraries. Nothing of the crate openssl may be called before.
///
/// # Errors
/// When they are not installed, or lack a function.
pub(crate) fn load() -> anyhow::Result<()> {
    let unusable = || format!("cannot use {LIBRARY}: install OpenSSL 3");
    // SAFETY: the libraries' initialisers may run at any time.
    let library = unsafe { Library::open(Some(LIBRARY), RTLD_NOW | RTLD_LOCAL) }.with_context(unusable)?;
    for (name, slot) in NAMES.iter().zip(&TABLE) {
        // SAFETY: only the address is taken; the crate openssl-sys declares the types.
        let function = unsafe { library.get::<*mut c_void>(*name) }.with_context(unusable)?;
        slot.store(function.as_raw_ptr(), Ordering::Release);
    }
    // The addresses are good for as long as the process lives.
    std::mem::forget(library);
    Ok(())
}
