//! A fresh database of each kind.

use std::sync::atomic::{AtomicU32, Ordering};

use storage::{Options, Store};

static NUMBER: AtomicU32 = AtomicU32::new(0);

pub struct Database {
    url: String,
    /// Whether what was written is there when it is opened again.
    pub lasting: bool,
    _directory: Option<tempfile::TempDir>,
}

impl Database {
    pub fn memory() -> Self {
        Self {
            url: "sqlite::memory:".to_owned(),
            lasting: false,
            _directory: None,
        }
    }

    pub fn file() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vestibule.db");
        Self {
            url: format!("sqlite:{}", path.display()),
            lasting: true,
            _directory: Some(directory),
        }
    }

    /// `None` where the variable is not set.
    pub async fn postgres() -> Option<Self> {
        let server = std::env::var("VESTIBULE_TEST_POSTGRES").ok()?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("conformance_{}_{number}", std::process::id());
        let (client, connection) = tokio_postgres::connect(&server, tokio_postgres::NoTls)
            .await
            .unwrap();
        let connection = tokio::spawn(connection);
        client
            .batch_execute(&format!("CREATE DATABASE {name}"))
            .await
            .unwrap();
        drop(client);
        connection.await.unwrap().unwrap();
        let (server, _) = server.rsplit_once('/').unwrap();
        Some(Self {
            url: format!("{server}/{name}"),
            lasting: true,
            _directory: None,
        })
    }

    pub fn is_sqlite(&self) -> bool {
        self.url.starts_with("sqlite")
    }

    pub async fn open(&self) -> Store {
        Store::open(&self.url, Options::default()).await.unwrap()
    }
}
