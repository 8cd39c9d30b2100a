//! The directory source: ordinary Kubernetes YAML and JSON, read again when it changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;

use super::directory::Directory;
use super::{Event, Source};

/// Every `*.yaml`, `*.yml` and `*.json` in one directory, in the order of their names.
#[derive(Debug)]
pub struct FileSource {
    directory: Directory,
    timing: Timing,
}

/// How long the source waits.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// After a change, until there has been none for this long: a change is seldom a single event.
    pub settle: Duration,
    /// Between readings that nothing announced: a directory that was absent, a network file system.
    pub poll: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { settle: Duration::from_millis(50), poll: Duration::from_secs(10) }
    }
}

impl FileSource {
    /// `node` is the name of the node this agent runs on.
    pub fn new(directory: impl Into<PathBuf>, node: impl Into<Box<str>>, timing: Timing) -> Self {
        Self { directory: Directory::new(directory.into(), node.into()), timing }
    }
}

impl Source for FileSource {
    async fn run(self, events: Sender<Event>) {
        let Self { mut directory, timing } = self;
        let changed = Arc::new(Notify::new());
        let mut watcher = watcher(changed.clone());
        loop {
            watch(watcher.as_mut(), directory.path());
            directory = read(directory, events.clone()).await;
            tokio::select! {
                () = events.closed() => return,
                () = changed.notified() => settle(&changed, timing.settle).await,
                () = tokio::time::sleep(timing.poll) => {}
            }
        }
    }
}

/// Reads on a thread of its own: files may be slow, and parsing a large one takes its time.
async fn read(mut directory: Directory, events: Sender<Event>) -> Directory {
    let reading = tokio::task::spawn_blocking(move || {
        // A receiver that is gone is noticed by the loop.
        directory.read(&mut |event| drop(events.blocking_send(event)));
        directory
    });
    match reading.await {
        Ok(directory) => directory,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Returns when nothing has changed for a while, or after a second in which something always did.
async fn settle(changed: &Notify, quiet: Duration) {
    let settled = async { while tokio::time::timeout(quiet, changed.notified()).await.is_ok() {} };
    // Whether it settled or not, it is read.
    drop(tokio::time::timeout(quiet.max(Duration::from_millis(50)) * 20, settled).await);
}

/// `None` where the kernel gives none: then the polls must do.
fn watcher(changed: Arc<Notify>) -> Option<RecommendedWatcher> {
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading must not look like a change.
        let ours = event.is_ok_and(|event| match event.kind {
            EventKind::Access(kind) => kind != AccessKind::Close(AccessMode::Write),
            EventKind::Any
            | EventKind::Create(_)
            | EventKind::Modify(_)
            | EventKind::Remove(_)
            | EventKind::Other => false,
        });
        if !ours {
            changed.notify_one();
        }
    });
    watcher.inspect_err(|error| tracing::warn!("changes of files are found by polling only: {error}")).ok()
}

/// Watches the directory that now has this path; it may be another one than before.
fn watch(watcher: Option<&mut RecommendedWatcher>, path: &Path) {
    if let Some(Err(error)) = watcher.map(|watcher| watcher.watch(path, RecursiveMode::NonRecursive)) {
        tracing::debug!("{}: not watched: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use tokio::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::model::Change;

    fn start(path: &Path, poll: Duration) -> Receiver<Event> {
        let (sender, events) = channel(16);
        let timing = Timing { settle: Duration::from_millis(5), poll };
        tokio::spawn(FileSource::new(path, "here", timing).run(sender));
        events
    }

    /// The port of the next Service that is set; 0 for one that is gone. Passes over everything else.
    async fn next_port(events: &mut Receiver<Event>) -> u16 {
        loop {
            let event = tokio::time::timeout(Duration::from_secs(20), events.recv()).await;
            if let Event::Change(Change::Service(_, service)) = event.expect("no change was seen").unwrap() {
                return service.map_or(0, |service| service.ports[0].port.host());
            }
        }
    }

    fn web(port: u16) -> String {
        format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: web}}, \
             spec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}}}"
        )
    }

    const NEVER: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn writes_renames_and_removals_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("web.yaml");
        fs::write(&file, web(1)).unwrap();
        let mut events = start(dir.path(), NEVER);
        assert_eq!(next_port(&mut events).await, 1);
        assert_eq!(events.recv().await, Some(Event::Synced));
        fs::write(&file, web(2)).unwrap();
        assert_eq!(next_port(&mut events).await, 2);
        fs::write(dir.path().join(".new"), web(3)).unwrap();
        fs::rename(dir.path().join(".new"), &file).unwrap();
        assert_eq!(next_port(&mut events).await, 3);
        fs::remove_file(&file).unwrap();
        assert_eq!(next_port(&mut events).await, 0);
    }

    #[tokio::test]
    async fn the_swap_of_a_config_map_volume_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        for port in [1, 2] {
            fs::create_dir(dir.path().join(format!("..{port}"))).unwrap();
            fs::write(dir.path().join(format!("..{port}/web.yaml")), web(port)).unwrap();
        }
        symlink("..1", dir.path().join("..data")).unwrap();
        symlink("..data/web.yaml", dir.path().join("web.yaml")).unwrap();
        let mut events = start(dir.path(), NEVER);
        assert_eq!(next_port(&mut events).await, 1);
        symlink("..2", dir.path().join("..data_tmp")).unwrap();
        fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
        assert_eq!(next_port(&mut events).await, 2);
    }

    #[tokio::test]
    async fn a_directory_that_is_replaced_is_watched_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("objects");
        let mut events = start(&path, Duration::from_millis(20));
        assert!(matches!(events.recv().await, Some(Event::Problems(problems)) if problems.len() == 1));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("web.yaml"), web(1)).unwrap();
        assert_eq!(next_port(&mut events).await, 1);
        fs::rename(&path, dir.path().join("old")).unwrap();
        fs::create_dir(dir.path().join("new")).unwrap();
        fs::write(dir.path().join("new/web.yaml"), web(2)).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert_eq!(next_port(&mut events).await, 2);
    }
}
