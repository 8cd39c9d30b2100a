//! Embeds the BPF object that `cargo xtask build` names; without one the agent builds and tests, and says so when run.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(embedded_object)");
    println!("cargo::rerun-if-env-changed=FERROFLOW_OBJECT");
    if let Ok(path) = std::env::var("FERROFLOW_OBJECT") {
        println!("cargo::rerun-if-changed={path}");
        println!("cargo::rustc-env=FERROFLOW_OBJECT={path}");
        println!("cargo::rustc-cfg=embedded_object");
    }
}
