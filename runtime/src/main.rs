//! The program `volley`.

fn main() -> std::process::ExitCode {
    volley::cli::main()
}
