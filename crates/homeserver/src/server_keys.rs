//! Who speaks to us from elsewhere, and with which key: the key ring's rows, and the check of a request.

use std::collections::BTreeMap;
use std::sync::Arc;

use federation::{AuthError, KeyStore, StoredKey};
use futures::future::BoxFuture;
use protocol::id::ServerName;
use protocol::signature::VerifyKey;
use serde_json::Value;
use storage::Store;
use storage::queues::{self, ServerKey};

use crate::Homeserver;
use crate::error::{self, MatrixError};

/// The key ring's rows in our store.
pub(crate) struct StoredKeys(pub Store);

impl KeyStore for StoredKeys {
    fn load(&self, servers: Vec<ServerName>) -> BoxFuture<'_, Result<Vec<StoredKey>, String>> {
        Box::pin(async move {
            let rows = self
                .0
                .read(move |c| queues::server_keys(c, &servers))
                .await
                .map_err(|error| error.to_string())?;
            let keys = rows.into_iter().filter_map(|row| {
                Some(StoredKey {
                    server: row.server,
                    key_id: row.key_id,
                    key: VerifyKey::parse(&row.public_key).ok()?,
                    valid_until_ms: row.valid_until_ms,
                    old: row.old,
                    fetched_at_ms: row.fetched_ms,
                    response: Arc::from(row.response),
                })
            });
            Ok(keys.collect())
        })
    }

    fn save(&self, keys: Vec<StoredKey>) -> BoxFuture<'_, Result<(), String>> {
        let rows: Vec<ServerKey> = keys
            .into_iter()
            .map(|key| ServerKey {
                server: key.server,
                key_id: key.key_id,
                public_key: key.key.to_base64(),
                valid_until_ms: key.valid_until_ms,
                old: key.old,
                fetched_ms: key.fetched_at_ms,
                response: key.response.to_string(),
            })
            .collect();
        Box::pin(async move {
            self.0
                .write(move |c| queues::save_server_keys(c, &rows))
                .await
                .map_err(|error| error.to_string())
        })
    }
}

impl Homeserver {
    /// Which server a federation request comes from (R-2, R-2a). `authorization` is the header as it came,
    /// `uri` path and query likewise; an empty body is none.
    pub async fn authenticate_server(
        &self,
        authorization: Option<&str>,
        method: &str,
        uri: &str,
        body: &[u8],
    ) -> error::Result<ServerName> {
        self.keys()
            .verify_request(authorization, method, uri, body)
            .await
            .map_err(|error| match error {
                AuthError::NotJson => MatrixError::not_json("The body is not JSON"),
                error => MatrixError::unauthorized(error.to_string()),
            })
    }

    /// `GET /_matrix/key/v2/server`
    pub fn own_server_keys(&self) -> Value {
        self.keys().own_keys()
    }

    /// `/_matrix/key/v2/query`: for each server the keys wanted, and until when they should be valid.
    pub async fn notarise(
        &self,
        wanted: BTreeMap<ServerName, BTreeMap<String, Option<i64>>>,
    ) -> Value {
        self.keys().notarise(wanted).await
    }
}
