package nightstream;

import java.util.Collection;
import org.apache.flink.contrib.streaming.state.RocksDBOptionsFactory;
import org.rocksdb.ColumnFamilyOptions;
import org.rocksdb.DBOptions;

/**
 * Lets RocksDB begin its list of files anew when it has become larger than what it lists.
 *
 * <p>Each checkpoint adds to the list, and holds a copy of it as a whole; by itself it would grow to a gigabyte.
 */
public class BoundedManifests implements RocksDBOptionsFactory {

  private static final long MANIFEST_BYTES = 128 * 1024;

  @Override
  public DBOptions createDBOptions(DBOptions options, Collection<AutoCloseable> handles) {
    return options.setMaxManifestFileSize(MANIFEST_BYTES);
  }

  @Override
  public ColumnFamilyOptions createColumnOptions(ColumnFamilyOptions options, Collection<AutoCloseable> handles) {
    return options;
  }
}
