//! A cluster that is what a directory of manifests says, as it says it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;

use super::{Shared, parse};

/// Follows until it is dropped.
#[derive(Debug)]
pub struct Follower {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Files are looked at this often.
const INTERVAL: Duration = Duration::from_millis(10);

impl Follower {
    /// The first state is served when this returns.
    pub(super) fn start(shared: Arc<Shared>, directory: &Path) -> Result<Self> {
        let mut last = read(directory)?;
        shared.set_objects(parse(last.values())?)?;
        let (stop, directory) = (Arc::new(AtomicBool::new(false)), directory.to_owned());
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("follower".into()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(INTERVAL);
                let Ok(texts) = read(&directory) else { continue };
                if texts != last {
                    if let Err(error) = parse(texts.values()).and_then(|objects| shared.set_objects(objects))
                    {
                        eprintln!("the API server keeps what it had: {error:#}");
                    }
                    last = texts;
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn read(directory: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut texts = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path)?;
        texts.insert(path, text);
    }
    Ok(texts)
}
